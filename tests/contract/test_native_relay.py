"""The relay's steps, in Python and compiled, under what peers do to them: no byte lost or misplaced."""

from __future__ import annotations

import gc
import random
import socket
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from time import monotonic
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynctl.frontend.lane import lane
from dynctl.http.direct import READ_BYTES, writer
from dynctl.http.framing import LAST_CHUNK, ChunkReader, FramingError, frame_chunk
from dynctl.http.tap import PythonTap, tap
from dynctl.native import load
from dynctl.native.load import Tap
from dynctl.observability.metrics import Histogram

pytestmark = pytest.mark.usefixtures("each_relay")

TOKEN = frame_chunk(b'data: {"text": "a token"}\n\n')
Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        ours.setblocking(False)
        yield ours, theirs


class Connection:
    """Stands for an upstream connection: follows the framing, hands on what it may."""

    def __init__(self, sink: Callable[[bytes], None] | None = None) -> None:
        self.pieces: list[bytes] = []
        self.told: list[str] = []
        self.reader = ChunkReader()
        self.sink = sink
        self.feed: Callable[[bytes], None] = self.keep
        self.tap: Tap | None = None

    def keep(self, data: bytes) -> None:
        self.pieces.append(data)
        if self.sink is not None:
            self.sink(data)

    def redirect(self, feed: Callable[[bytes], None]) -> None:
        assert self.tap is not None
        self.feed = self.tap.feed = feed

    def body_received(self, data: bytes) -> None:
        assert self.tap is not None
        try:
            end = self.reader.feed(data)
        except FramingError as error:
            self.told.append(f"broken: {error}")
            self.tap.active = False
            return
        self.feed(data if end < 0 else data[:end])
        if end >= 0:
            self.told.append(f"over, {len(data) - end} bytes left")
            self.tap.active = False

    def between_chunks(self) -> bool:
        return self.reader.between

    def reading_ended(self) -> None:
        self.told.append("ended")

    def reading_failed(self, error: OSError) -> None:
        self.told.append(type(error).__name__)

    def taking_failed(self, error: Exception) -> None:
        self.told.append(f"failed: {error!r}")


def tapped(ours: socket.socket, sink: Callable[[bytes], None] | None = None) -> tuple[Connection, Tap]:
    connection = Connection(sink)
    made = connection.tap = tap(ours, connection)
    made.begin(connection.feed)
    return connection, made


# --- reading


CHUNK = st.one_of(
    st.binary(min_size=1, max_size=40).map(frame_chunk),
    st.sampled_from(
        [TOKEN, TOKEN * 3, b"3;x=y\r\nabc\r\n", b"003\r\nabc\r\n", b"0003\r\nabc\r\n", b"A\r\n0123456789\r\n"]
    ),
)
ODD = st.sampled_from(
    [
        *(b"0\r\n\r\n", b"0\r\nt: 1\r\n\r\n", b"zz\r\n", b"3\r\nabcd\r\n", b"3\r\nabcde", b"3\r\nabc\rx"),
        *(b"3\nabc\n", b"ffffffffff\r\n", b"-1\r\n", b"\r\n"),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    body=st.lists(st.one_of(CHUNK, CHUNK, CHUNK, ODD), max_size=8).map(b"".join),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def check_both_see_the_same(body: bytes, cuts: list[int]) -> None:
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    parts = [body[a:b] for a, b in pairwise(places)]
    seen = []
    for make in (PythonTap, lambda own, taker: load.compiled.Tap(own.fileno, taker)):  # type: ignore[union-attr]
        ours, theirs = socket.socketpair()
        with closing(ours), closing(theirs):
            ours.setblocking(False)
            connection = Connection()
            made = connection.tap = make(ours, connection)
            made.begin(connection.feed)
            for part in parts:
                theirs.sendall(part)
                made.readable()
            reader = connection.reader
            seen.append((connection.pieces, connection.told, reader.between, reader._left, reader._pending))
    assert seen[0] == seen[1]


@pytest.mark.compiled
def test_whatever_comes_and_however_cut_both_see_the_same() -> None:
    if load.compiled is None:  # the half of `each_relay` that has none to compare with
        return
    check_both_see_the_same()


def test_size_lines_that_come_byte_by_byte(pair: Pair) -> None:
    ours, theirs = pair
    connection, made = tapped(ours)
    body = TOKEN * 3 + frame_chunk(b"x" * 300) + TOKEN
    for number in range(len(body)):
        theirs.sendall(body[number : number + 1])
        made.readable()
    assert b"".join(connection.pieces) == body
    assert connection.told == []
    theirs.sendall(LAST_CHUNK + b"more")
    made.readable()
    assert b"".join(connection.pieces) == body + LAST_CHUNK
    assert connection.told == ["over, 4 bytes left"]


def test_more_than_one_read_is_taken_at_once(pair: Pair) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * READ_BYTES)
    body = frame_chunk(bytes(READ_BYTES + 5)) + TOKEN
    connection, made = tapped(ours)
    theirs.sendall(body)
    made.readable()
    assert b"".join(connection.pieces) == body
    assert len(connection.pieces) == 2


def test_a_paused_tap_takes_nothing_also_from_within_its_taker(pair: Pair) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * READ_BYTES)
    connection, made = tapped(ours, lambda _: setattr(made, "active", False))
    body = frame_chunk(bytes(3 * READ_BYTES))
    theirs.sendall(body)
    made.readable()
    made.readable()
    assert len(connection.pieces) == 1
    connection.sink = None
    made.active = True
    made.readable()
    assert b"".join(connection.pieces) == body


def test_a_chunk_that_is_not_closed_is_not_handed_on(pair: Pair) -> None:
    ours, theirs = pair
    connection, made = tapped(ours)
    theirs.sendall(TOKEN + b"3\r\nabcde")
    made.readable()
    assert connection.pieces == []
    assert connection.told == ["broken: a chunk is longer or shorter than its size line says"]


def test_another_taker_gets_what_comes_next(pair: Pair) -> None:
    ours, theirs = pair
    other: list[bytes] = []
    connection, made = tapped(ours, lambda _: connection.redirect(other.append))
    for _ in range(3):
        theirs.sendall(TOKEN)
        made.readable()
    assert connection.pieces == [TOKEN]
    assert other == [TOKEN, TOKEN]


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_taker_raises_is_told_and_raised(pair: Pair, whole: bool) -> None:
    def raising(_: bytes) -> None:
        raise ZeroDivisionError("the sink's own")

    ours, theirs = pair
    connection, made = tapped(ours, raising)
    theirs.sendall(TOKEN if whole else TOKEN[:5])
    with pytest.raises(ZeroDivisionError, match="the sink's own"):
        made.readable()
    assert connection.told == ['failed: ZeroDivisionError("the sink\'s own")']


def test_an_end_a_reset_and_a_closed_socket_are_told(pair: Pair) -> None:
    ours, theirs = pair
    connection, made = tapped(ours)
    made.readable()
    assert connection.told == []
    theirs.shutdown(socket.SHUT_WR)
    made.readable()
    assert connection.told == ["ended"]
    ours.close()
    made.readable()
    assert connection.told == ["ended", "OSError"]


def test_a_reset_is_told() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with closing(listener), closing(socket.create_connection(listener.getsockname())) as ours:
        theirs, _ = listener.accept()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        ours.setblocking(False)
        connection, made = tapped(ours)
        made.readable()
        assert connection.told == ["ConnectionResetError"]


# --- writing


class Transport:
    """Stands for a transport: keeps what it is left with."""

    def __init__(self) -> None:
        self.rest: list[bytes] = []
        self.waiting = 0

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: bytes) -> None:
        self.rest.append(data)


def test_what_the_kernel_does_not_take_is_the_transports(pair: Pair) -> None:
    ours, theirs = pair
    transport = Transport()
    write = writer(transport, ours)  # type: ignore[arg-type]
    data = random.Random(1).randbytes(4_000_000)
    write(b"first")
    write(data)
    assert 0 < len(transport.rest[0]) < len(data)
    write(b"no room for this")
    transport.waiting = 1
    assert theirs.recv(5) == b"first"
    write(b"nor may this overtake")
    assert transport.rest[1:] == [b"no room for this", b"nor may this overtake"]
    got = bytearray()
    while len(got) < len(data) - len(transport.rest[0]):
        got += theirs.recv(1 << 20)
    assert bytes(got) + transport.rest[0] == data


def test_nothing_overtakes_what_the_transport_still_has(pair: Pair) -> None:
    ours, theirs = pair
    transport = Transport()
    transport.waiting = 1
    writer(transport, ours)(b"second")  # type: ignore[arg-type]
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        theirs.recv(10)
    assert transport.rest == [b"second"]


def test_a_peer_that_is_gone_is_the_transports_to_tell(pair: Pair) -> None:
    ours, theirs = pair
    transport = Transport()
    write = writer(transport, ours)  # type: ignore[arg-type]
    theirs.close()
    write(b"to nobody")
    assert transport.rest == [b"to nobody"]


def test_a_writer_whose_connection_is_gone_writes_into_no_other() -> None:
    transport = Transport()
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    write = writer(transport, ours)  # type: ignore[arg-type]
    ours.close()
    theirs.close()
    first, second = socket.socketpair()  # takes the numbers that are free
    with closing(first), closing(second):
        assert number in (first.fileno(), second.fileno())
        write(b"late")
        for one in (first, second):
            one.setblocking(False)
            with pytest.raises(BlockingIOError):
                one.recv(10)
    assert transport.rest == [b"late"]


# --- counting


class Sent:
    """Stands for an exchange."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.write: Callable[[bytes], None] = self.written.append


def nothing() -> None:
    """There is nothing to fold."""


def test_usual_pieces_are_written_counted_and_kept_others_are_not() -> None:
    sent, itl = Sent(), Histogram((0.5, 1.0))
    odd: list[bytes] = []
    folds: list[int] = []
    one = lane(sent, itl, odd.append, lambda: folds.append(len(one.pieces)), 3, b"\n\n")
    one.feed(b"data: 1\n\n")
    one.feed(b"data: 2")
    one.feed(b"")
    one.feed(b": nothing\n\n")
    sent.write = lambda data: sent.written.append(b"other " + data)
    one.feed(b"data: 3\n\ndata: 4\n\n")
    assert odd == [b"data: 2", b""]
    assert sent.written == [b"data: 1\n\n", b": nothing\n\n", b"other data: 3\n\ndata: 4\n\n"]
    assert list(one.pieces) == [b"data: 1\n\n", b": nothing\n\n", b"data: 3\n\ndata: 4\n\n"]
    assert (one.events, sum(itl.counts), folds) == (3, 3, [3])
    assert itl.counts[0] == 2  # the first came "after" the clock's beginning, two within half a second
    assert itl.total > 0
    assert one.last_s > 0


@pytest.mark.parametrize(("waited_s", "place"), [(0.2, 0), (0.7, 1), (1.7, 2), (9.0, 3)])
def test_the_time_between_tokens_is_counted_where_it_belongs(waited_s: float, place: int) -> None:
    itl = Histogram((0.5, 1.0, 2.0))
    one = lane(Sent(), itl, Sent().write, nothing, 9, b"\n\n")
    one.last_s = monotonic() - 2 * waited_s
    one.feed(b"data: 1\n\ndata: 2\n\n")
    assert itl.counts == [2 if number == place else 0 for number in range(4)]
    assert itl.total >= 2 * waited_s


def test_a_piece_that_is_shorter_than_a_tail_is_unusual() -> None:
    odd: list[bytes] = []
    one = lane(Sent(), Histogram((1.0,)), odd.append, nothing, 9, b"x" * 5_000)
    one.feed(b"x")
    assert odd == [b"x"]


@pytest.mark.parametrize("where", ["write", "unusual", "fold", "histogram"])
def test_what_is_raised_on_the_way_comes_out(where: str) -> None:
    def raising(*_: Any) -> None:
        raise ZeroDivisionError(where)

    sent, itl = Sent(), Histogram((0.5, 1.0))
    if where == "write":
        sent.write = raising
    if where == "histogram":
        itl.counts.clear()
    one = lane(sent, itl, raising, raising, 1, b"\n\n")
    with pytest.raises(IndexError if where == "histogram" else ZeroDivisionError):
        one.feed(b"data: 1" if where == "unusual" else b"data: 1\n\n")


def test_nothing_is_held_longer_than_it_is_used(pair: Pair) -> None:
    ours, theirs = pair
    sent, itl = Sent(), Histogram((0.5, 1.0))
    data = b"data: %d\n\n" % random.getrandbits(64)
    one = lane(sent, itl, sent.write, nothing, 1 << 30, b"\n\n")
    connection, made = tapped(ours)

    def turns() -> None:
        for _ in range(2_000):
            one.feed(data)
            theirs.sendall(TOKEN)
            made.readable()
        for kept in (sent.written, one.pieces, connection.pieces):
            kept.clear()

    turns()
    before, blocks = sys.getrefcount(data), sys.getallocatedblocks()
    turns()
    assert sys.getrefcount(data) == before
    assert sys.getallocatedblocks() - blocks < 500


def test_what_refers_to_itself_is_collected() -> None:
    class Owner(Sent):
        def __init__(self, own: socket.socket) -> None:
            super().__init__()
            self.lane = lane(self, Histogram((1.0,)), self.take, nothing, 9, b"\n")
            self.write = writer(Transport(), own)  # type: ignore[arg-type]
            self.tap = tap(own, self)  # type: ignore[arg-type]
            self.tap.feed = self.take

        def take(self, data: bytes) -> None: ...

    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        gone = weakref.ref(Owner(ours))
        gc.collect()
        assert gone() is None
