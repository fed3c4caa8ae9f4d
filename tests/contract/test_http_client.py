"""The client against upstreams that answer in every way, and against those that fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from dynctl.errors import CodecError, ConnectFailed, DeadlineExceeded, PeerLost
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.framing import frame_chunk
from tests.contract.http_wire import (
    CHUNKED,
    OK,
    TIMEOUTS,
    Recorder,
    client,
    here,
    on_uvloop,
    saying,
    scripted,
    served,
    until,
)


class Collect:
    """A sink that keeps what it is fed."""

    def __init__(self) -> None:
        self.data = b""

    def feed(self, data: bytes) -> None:
        self.data += data


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1", Origin("http", "h", 1)),
        ("https://h", Origin("https", "h", 443)),
        ("http://[::1]:80/", Origin("http", "::1", 80)),
    ],
)
def test_origins(url: str, expected: Origin) -> None:
    origin = Origin.parse(url)
    assert origin == expected
    assert Origin.parse(str(origin)) == origin


@pytest.mark.parametrize(
    "url", ["", "h:1", "ftp://h", "http://", "http://h:x", "http://h/p", "http://u@h", "http://h?q"]
)
def test_what_is_not_an_origin_is_refused(url: str) -> None:
    with pytest.raises(CodecError, match="http://host:port"):
        Origin.parse(url)


@pytest.mark.parametrize(
    ("pieces", "close", "status", "body"),
    [
        ((OK + b"Content-Length: 3\r\n\r\nabc",), False, 200, b"abc"),
        ((OK + b"Content-Length: 3\r\n\r\n", b"ab", b"c"), False, 200, b"abc"),
        ((b"HTTP/1.1 404 No\r\nContent-Len", b"gth: 0\r\n\r", b"\n"), False, 404, b""),
        ((CHUNKED, frame_chunk(b"abc")[:2], frame_chunk(b"abc")[2:] + b"0\r\n", b"\r\n"), False, 200, b"abc"),
        ((OK + b"\r\nab", b"c"), True, 200, b"abc"),
        ((b"HTTP/1.0 200 OK\r\n\r\nabc",), True, 200, b"abc"),
        (
            (
                b"HTTP/1.1 100 Continue\r\n\r\n",
                b"HTTP/1.1 103 Hints\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\na",
            ),
            False,
            200,
            b"a",
        ),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False, 204, b""),
        ((b"HTTP/1.1 304 Same\r\nContent-Length: 9\r\n\r\n",), False, 304, b""),
    ],
)
def test_every_kind_of_answer(pieces: tuple[bytes, ...], close: bool, status: int, body: bytes) -> None:
    async def scenario() -> None:
        async with scripted(saying(*pieces, close=close)) as port, client() as one:
            for _ in range(2):
                response = await one.request(here(port), "POST", "/", body=b"q", timeout_s=5)
                assert (response.status, response.body) == (status, body)
            assert len(one._open) == (0 if close else 1)

    on_uvloop(scenario)()


@on_uvloop
async def test_head_has_no_body_whatever_its_length_says() -> None:
    async with scripted(saying(OK + b"Content-Length: 30\r\n\r\n")) as port, client() as one:
        for _ in range(2):
            assert (await one.request(here(port), "HEAD", "/", timeout_s=5)).body == b""


@on_uvloop
async def test_the_request_carries_its_own_framing_whatever_headers_are_passed_on() -> None:
    recorder = Recorder()
    async with served(recorder) as server, client() as one:
        passed = [
            (b"Host", b"evil"),
            (b"transfer-encoding", b"chunked"),
            (b"content-length", b"9"),
            (b"x", b"y"),
        ]
        await one.request(here(server.port), "POST", "/a?b", headers=passed, body=b"abc", timeout_s=5)
        (request,) = recorder.requests
        assert (request.target, request.body, request.header(b"x")) == ("/a?b", b"abc", b"y")
        assert request.header(b"host") == b"127.0.0.1:%d" % server.port


@on_uvloop
async def test_relay_hands_on_the_bytes_as_they_came_and_nothing_more() -> None:
    body = frame_chunk(b"abc") + b"5;x=y\r\nhello\r\n" + b"0\r\ntrailer: 1\r\n\r\n"
    async with (
        scripted(saying(CHUNKED + body[:4], body[4:9], body[9:] + b"surplus")) as port,
        client() as one,
    ):
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        sink = Collect()
        await stream.relay(sink)
        assert sink.data == body
        assert stream.framing == "chunked"
        assert stream.complete
        await until(lambda: not one._open)  # bytes nobody asked for: not used again


@pytest.mark.parametrize(
    "pieces",
    [
        (OK + b"Content-Length: 3\r\n\r\nab",),
        (CHUNKED + frame_chunk(b"abc"),),
        (CHUNKED + b"5\r\nab",),
        (CHUNKED + frame_chunk(b"abc"), b"0\r\n"),
    ],
)
def test_a_body_cut_short_is_a_lost_peer(pieces: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        async with scripted(saying(*pieces, close=True)) as port, client() as one:
            stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
            with pytest.raises(PeerLost, match="before its answer had ended"):
                await stream.relay(Collect())
            with pytest.raises(PeerLost):
                await one.request(here(port), "GET", "/", timeout_s=5)
            assert not stream.complete

    on_uvloop(scenario)()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "breaks HTTP"),
        (OK + b"Content-Length: x\r\n\r\n", "breaks HTTP"),
        (OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "breaks HTTP"),
        (OK + b"X: " + b"a" * 2000 + b"\r\n\r\n", "too large"),
        (OK + b"X: " + b"a" * 2000, "too large"),
        (CHUNKED + b"zz\r\n", "breaks HTTP"),
        (b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", "switched protocols"),
        (OK + b"Content-Length: 2000\r\n\r\n" + b"a" * 2000, "over 1000 bytes"),
        (b"", "before it answered"),
    ],
)
def test_answers_that_cannot_be_taken(sent: bytes, why: str) -> None:
    async def scenario() -> None:
        async with (
            scripted(saying(sent, close=True)) as port,
            client(header_bytes=1000, body_bytes=1000) as one,
        ):
            with pytest.raises(PeerLost, match=why) as caught:
                await one.request(here(port), "GET", "/", timeout_s=5)
            assert caught.value.where == f"http://127.0.0.1:{port}"
            await until(lambda: not one._open)

    on_uvloop(scenario)()


@on_uvloop
async def test_a_stale_connection_is_replaced_once() -> None:
    connections = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections < 3:
            writer.write(OK + b"Content-Length: 0\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")  # and close instead of answering the second one

    async with scripted(script) as port, client() as one:
        for _ in range(2):
            assert (await one.request(here(port), "GET", "/", timeout_s=5)).status == 200
        assert connections == 2
        with pytest.raises(PeerLost):
            await one.request(here(port), "GET", "/", timeout_s=5)
        assert connections == 3


@on_uvloop
async def test_a_request_that_must_not_be_sent_twice_is_not() -> None:
    asked = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        for answer in (OK + b"Content-Length: 0\r\n\r\n", b""):
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            writer.write(answer)

    async with scripted(script) as port, client(resend=False) as one:
        await one.request(here(port), "POST", "/", timeout_s=5)
        with pytest.raises(PeerLost):
            await one.request(here(port), "POST", "/", timeout_s=5)
        assert asked == 2


@on_uvloop
async def test_a_kept_connection_that_dies_amid_its_answer_is_not_tried_again() -> None:
    asked = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        for answer in (OK + b"Content-Length: 0\r\n\r\n", b"HTTP/1.1 2"):
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            writer.write(answer)
            await writer.drain()

    async with scripted(script) as port, client() as one:
        await one.request(here(port), "GET", "/", timeout_s=5)
        with pytest.raises(PeerLost):
            await one.request(here(port), "GET", "/", timeout_s=5)
        assert asked == 2


@on_uvloop
async def test_idle_connections_expire_and_are_bounded() -> None:
    async with served(Recorder()) as server, client(idle_expiry_s=0.1, max_idle=2) as one:
        ask = [one.request(here(server.port), "GET", "/", timeout_s=5) for _ in range(5)]
        await asyncio.gather(*ask)
        await until(lambda: server.connections <= 2)
        await until(lambda: server.connections == 0)
        assert not one._open


@on_uvloop
async def test_bytes_on_an_idle_connection_close_it() -> None:
    async with (
        scripted(saying(OK + b"Content-Length: 0\r\n\r\n", b"HTTP/1.1 408 Late\r\n\r\n")) as port,
        client() as one,
    ):
        await one.request(here(port), "GET", "/", timeout_s=5)
        await until(lambda: not one._open)
        assert len(one._pool) == 0


@on_uvloop
async def test_a_refused_connection_says_the_request_was_not_sent() -> None:
    async with scripted(saying()) as port:
        pass
    async with client() as one:
        with pytest.raises(ConnectFailed, match="cannot connect"):
            await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)


@on_uvloop
async def test_deadlines_of_connecting_answering_and_stalling() -> None:
    async with client() as one:
        with pytest.raises((DeadlineExceeded, ConnectFailed)):
            await one.open(Origin("http", "192.0.2.1", 9), "GET", "/", timeouts=Timeouts(0.05, 1, 1))
        quick = Timeouts(connect_s=5, first_byte_s=0.1, stall_s=0.1)
        async with scripted(saying()) as port:
            with pytest.raises(DeadlineExceeded, match="did not answer"):
                await one.open(here(port), "GET", "/", timeouts=quick)
            with pytest.raises(DeadlineExceeded, match=r"in 0\.5 s|in time"):
                await one.request(here(port), "GET", "/", timeout_s=0.5)
        async with scripted(saying(CHUNKED, frame_chunk(b"abc"))) as port:
            stream = await one.open(here(port), "GET", "/", timeouts=Timeouts(5, 5, 0.1))
            with pytest.raises(DeadlineExceeded, match="stalled"):
                await stream.relay(Collect())
        await until(lambda: not one._open)


@on_uvloop
async def test_a_paused_stream_does_not_stall_and_goes_on() -> None:
    async with scripted(saying(CHUNKED, *[frame_chunk(b"x")] * 20, b"0\r\n\r\n")) as port, client() as one:
        stream = await one.open(here(port), "GET", "/", timeouts=Timeouts(5, 5, 0.1))
        sink = Collect()
        relaying = asyncio.create_task(stream.relay(sink))
        await until(lambda: len(sink.data) > 0)
        stream.pause()
        await asyncio.wait([relaying], timeout=0.3)
        assert not relaying.done()
        stream.resume()
        await relaying
        assert sink.data.endswith(b"0\r\n\r\n")
        stream.pause()
        stream.resume()


@on_uvloop
async def test_cancelling_whoever_waits_closes_the_connection() -> None:
    async with scripted(saying(CHUNKED)) as port, client() as one:
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        relaying = asyncio.create_task(stream.relay(Collect()))
        await asyncio.sleep(0)
        relaying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await relaying
        await until(lambda: not one._open)
    async with scripted(saying()) as port, client() as one:
        opening = asyncio.create_task(one.open(here(port), "GET", "/", timeouts=TIMEOUTS))
        await until(lambda: bool(one._open))
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        await until(lambda: not one._open)


@on_uvloop
async def test_abort_closes_the_connection_and_whoever_relays_is_told() -> None:
    async with scripted(saying(CHUNKED)) as port, client() as one:
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        asyncio.get_running_loop().call_soon(stream.abort)
        with pytest.raises(PeerLost, match="given up"):
            await stream.relay(Collect())
        await until(lambda: not one._open)
        stream.abort()


@on_uvloop
async def test_what_a_sink_raises_reaches_whoever_relays() -> None:
    class Broken:
        def feed(self, data: bytes) -> None:
            raise KeyError("sink")

    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    for delay in (b"", frame_chunk(b"early")):
        script = saying(CHUNKED + delay, frame_chunk(b"abc"), frame_chunk(b"def"))
        async with scripted(script) as port, client() as one:
            stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
            with pytest.raises(KeyError, match="sink"):
                await stream.relay(Broken())
            await until(lambda one=one: not one._open)  # type: ignore[misc]


@on_uvloop
async def test_an_answer_that_ended_is_still_whole_when_its_connection_serves_another() -> None:
    async with scripted(saying(CHUNKED + frame_chunk(b"first") + b"0\r\n\r\n")) as port, client() as one:
        first = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        second = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        await until(lambda: first.ended and second.ended)
        assert len(one._open) <= 2
        third = await one.request(here(port), "GET", "/", timeout_s=5)
        sink = Collect()
        await first.relay(sink)
        assert sink.data == frame_chunk(b"first") + b"0\r\n\r\n"
        assert await second.read(100) == third.body == b"first"


@on_uvloop
async def test_a_body_nobody_takes_is_not_read_without_bound() -> None:
    size = 50_000_000

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % size)
        for _ in range(50):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
        await reader.read()

    async with scripted(script) as port, client() as one:
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        (connection,) = one._open
        await until(lambda: connection._paused)
        assert stream._held_bytes < 2_000_000
        got = 0
        async with aclosing(stream.iter_body()) as pieces:
            async for piece in pieces:
                got += len(piece)
                await asyncio.sleep(0)
        assert got == size


@on_uvloop
async def test_leaving_a_body_early_closes_the_connection() -> None:
    async with scripted(saying(CHUNKED + frame_chunk(b"abc"))) as port, client() as one:
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        async with aclosing(stream.iter_body()) as pieces:
            async for piece in pieces:
                assert piece == b"abc"
                break
        await until(lambda: not one._open)


@on_uvloop
async def test_a_closed_client_ends_its_streams_and_opens_no_more() -> None:
    async with scripted(saying(CHUNKED)) as port:
        one = Client()
        stream = await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(one.close()))
        with pytest.raises(PeerLost):
            await stream.relay(Collect())
        with pytest.raises(PeerLost, match="closed"):
            await one.open(here(port), "GET", "/", timeouts=TIMEOUTS)
