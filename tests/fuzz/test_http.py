"""Bytes from the network that no well-behaved peer would send: a verdict each time, and always the same."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dynctl.errors import DeadlineExceeded, PeerLost
from dynctl.http.client import Client
from dynctl.http.heads import HeadError
from dynctl.http.limits import Limits
from dynctl.http.request import Request, RequestReader
from dynctl.http.stream import Stream
from dynctl.http.upstream import Timeouts, UpstreamConnection
from tests.fuzz.conftest import FUZZ

LIMITS = Limits(header_bytes=400, body_bytes=200)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\n ", b"\0", b"\r\r\n", b""])
NUMBERS = st.sampled_from(
    [b"0", b"3", b"03", b"+3", b"3, 3", b"3,4", b"-1", b"9" * 30, b"0x3", b"", b" 3 ", b"1e1"]
)
CODINGS = st.sampled_from(
    [b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"\x0bchunked", b"identity", b"x"]
)
HEADERS = st.one_of(
    st.builds(lambda end, n: b"Content-Length: " + n + end, ENDS, NUMBERS),
    st.builds(lambda end, n: b"Transfer-Encoding: " + n + end, ENDS, CODINGS),
    st.builds(lambda end, n: b"content-length :" + n + end, ENDS, NUMBERS),
    st.builds(lambda end, v: b"X: " + v + end, ENDS, st.binary(max_size=20)),
    st.sampled_from(
        [b"Host: h\r\n", b"Host: h\r\nHost: i\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"]
    ),
)
CHUNKS = st.lists(
    st.one_of(
        st.sampled_from(
            [b"0\r\n\r\n", b"3\r\nabc\r\n", b"3;x=y\r\nabc\r\n", b"0\r\nt: 1\r\n\r\n", b"g\r\n", b"3\nabc\n"]
        ),
        st.binary(max_size=12),
    ),
    max_size=4,
).map(b"".join)
FIRST = st.sampled_from(
    [
        b"POST /a HTTP/1.1",
        b"GET http://h/x HTTP/1.1",
        b"POST /a HTTP/1.0",
        b"PRI * HTTP/2.0",
        b"get / HTTP/1.1",
        b"POST /a\t HTTP/1.1",
    ]
)
MESSAGE = st.builds(
    lambda first, end, headers, blank, body: first + end + b"".join(headers) + blank + body,
    FIRST,
    ENDS,
    st.lists(HEADERS, max_size=5),
    ENDS,
    CHUNKS,
)
TRAFFIC = st.one_of(st.lists(MESSAGE, max_size=3).map(b"".join), st.binary(max_size=300))
CUTS = st.lists(st.integers(min_value=0, max_value=2000), max_size=6)
ANSWER = st.one_of(
    st.builds(
        lambda first, headers, body: first + b"".join(headers) + b"\r\n" + body,
        st.sampled_from(
            [
                b"HTTP/1.1 200 OK\r\n",
                b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 x\r\n",
                b"HTTP/1.0 200\r\n",
                b"HTTP/1.1 101 s\r\n",
                b"ICY 200 OK\r\n",
            ]
        ),
        st.lists(HEADERS, max_size=4),
        CHUNKS,
    ),
    st.binary(max_size=200),
)


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places) if a < b]


def read(pieces: list[bytes]) -> tuple[list[Request], str]:
    """The requests that came out, and the code of the refusal that ended it, if one did."""
    reader, found = RequestReader(LIMITS), []
    try:
        for piece in pieces:
            reader.feed(piece)
            while (request := reader.next()) is not None:
                found.append(request)
            assert reader.buffered <= LIMITS.header_bytes + LIMITS.body_bytes + len(piece)
    except HeadError as error:
        return found, error.code
    return found, ""


@FUZZ
@given(TRAFFIC, CUTS)
def test_a_server_reads_the_same_requests_however_the_bytes_are_cut(data: bytes, cuts: list[int]) -> None:
    """Two readers of one connection that disagree on where a request ends are how requests are smuggled."""
    whole, verdict = read([data])
    for pieces in (split(data, cuts), [bytes([byte]) for byte in data]):
        found, other = read(pieces)
        assert [(r.method, r.target, r.body) for r in found] == [(r.method, r.target, r.body) for r in whole]
        assert bool(other) == bool(verdict)


@FUZZ
@given(TRAFFIC)
def test_what_a_server_takes_for_a_request_is_framed_in_one_way_only(data: bytes) -> None:
    for request in read([data])[0]:
        names = [name for name, _ in request.headers]
        assert names.count(b"content-length") + names.count(b"transfer-encoding") <= 1
        assert (
            names.count(b"transfer-encoding") == 0
            or dict(request.headers)[b"transfer-encoding"].lower() == b"chunked"
        )
        assert all(
            b"\r" not in value and b"\n" not in value and b"\0" not in value for _, value in request.headers
        )
        assert len(request.body) <= LIMITS.body_bytes


class Wire(asyncio.Transport):
    """A transport that only remembers whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        assert not self.closed

    def resume_reading(self) -> None:
        assert not self.closed

    def get_write_buffer_size(self) -> int:
        return 0


async def answered(pieces: list[bytes]) -> None:
    wire, client = Wire(), Client(header_bytes=400)
    connection = UpstreamConnection(client, "http://h:1")
    connection.connection_made(wire)
    sending = asyncio.ensure_future(connection.send(b"GET", head_only=False, timeouts=Timeouts()))
    await asyncio.sleep(0)
    for piece in pieces:
        if not wire.closed:
            connection.data_received(piece)
    connection.connection_lost(None)
    try:
        stream: Stream = await asyncio.wait_for(sending, 5)
        body = await asyncio.wait_for(stream.read(10_000), 5)
        assert len(body) <= sum(map(len, pieces))
    except (PeerLost, DeadlineExceeded):
        return
    finally:
        await client.close()
    assert 200 <= stream.status <= 999


@FUZZ
@given(ANSWER, CUTS)
def test_a_client_is_told_of_a_lost_peer_or_gets_an_answer_and_never_waits_for_ever(
    data: bytes, cuts: list[int]
) -> None:
    asyncio.run(answered(split(data, cuts)))
