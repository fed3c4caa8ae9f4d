"""The server as clients see it: well-behaved, slow, broken and hostile ones."""

from __future__ import annotations

import asyncio
import json

import pytest

from dynctl.http.framing import frame_chunk
from dynctl.http.server import Exchange, Limits, Request
from tests.contract.http_wire import GET, QUICK, Recorder, Wire, on_uvloop, served, stream_three, until

SMALL = Limits(body_bytes=100)
POST = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"


@on_uvloop
async def test_keep_alive_answers_request_after_request() -> None:
    recorder = Recorder()
    async with served(recorder) as server:
        wire = await Wire.to(server.port)
        for _ in range(3):
            wire.send(POST)
            status, headers, body = await wire.answer()
            assert (status, body, headers[b"content-type"]) == (200, b"/p", b"text/plain")
            assert b"connection" not in headers
        assert server.connections == 1
        assert recorder.requests[0].body == b"abc"
        assert recorder.requests[0].peer.startswith("127.0.0.1:")
        await wire.close()


@on_uvloop
async def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    together = 0

    async def handler(request: Request, exchange: Exchange) -> None:
        nonlocal together
        together += 1
        assert together == 1
        await asyncio.sleep(0.02 if request.path == "/0" else 0)
        together -= 1
        exchange.respond(200, request.path.encode())

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: h\r\n\r\n" % i for i in range(5)))
        assert [(await wire.answer())[2] for _ in range(5)] == [b"/%d" % i for i in range(5)]
        await wire.close()


@on_uvloop
async def test_a_flood_of_pipelined_requests_is_not_read_ahead_without_bound() -> None:
    release = asyncio.Event()
    served_count = 0

    async def handler(request: Request, exchange: Exchange) -> None:
        nonlocal served_count
        await release.wait()
        served_count += 1
        exchange.respond(200)

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        many = 40_000
        sending = asyncio.create_task(_send_all(wire, GET * many))
        await until(lambda: server.inflight == 1)
        (one,) = server._connections
        await until(lambda: one._read_paused)
        assert one._reader.buffered < 1_000_000
        release.set()
        got = 0
        while got < many:
            got += (await wire.reader.read(1 << 20)).count(b"HTTP/1.1 200")
        assert served_count == many
        await sending
        await wire.close()


async def _send_all(wire: Wire, data: bytes) -> None:
    wire.send(data)
    await wire.writer.drain()


@on_uvloop
async def test_chunked_request_body() -> None:
    recorder = Recorder()
    async with served(recorder) as server:
        wire = await Wire.to(server.port)
        wire.send(b"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + frame_chunk(b"ab"))
        wire.send(frame_chunk(b"cd") + b"0\r\n\r\n" + GET)
        assert (await wire.answer())[2] == b"/c"
        assert (await wire.answer())[2] == b"/x"
        assert recorder.requests[0].body == b"abcd"
        await wire.close()


@on_uvloop
async def test_expect_continue_is_answered_before_the_body_comes() -> None:
    async with served(Recorder()) as server:
        wire = await Wire.to(server.port)
        wire.send(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert (await wire.head())[0] == 100
        wire.send(b"abc")
        assert (await wire.answer())[0] == 200
        await wire.close()


@on_uvloop
async def test_a_body_over_the_limit_is_413_without_reading_it_and_the_connection_ends() -> None:
    recorder = Recorder()
    async with served(recorder, SMALL) as server:
        wire = await Wire.to(server.port)
        wire.send(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 101\r\nExpect: 100-continue\r\n\r\n")
        status, headers, body = await wire.answer()
        assert (status, headers[b"connection"]) == (413, b"close")
        assert json.loads(body)["error"]["code"] == "body_too_large"
        assert await wire.rest() == b""
        assert recorder.requests == []
        await wire.close()


@on_uvloop
async def test_the_413_arrives_although_the_client_keeps_sending() -> None:
    async with served(Recorder(), SMALL) as server:
        wire = await Wire.to(server.port)
        wire.send(b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 3_000_000)
        assert (await wire.answer())[0] == 413
        await wire.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x00\xa5", 400),
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\n folded: x\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
        ),
        (b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 40_000, 431),
    ],
)
def test_broken_requests_get_an_openai_error_and_no_handler(sent: bytes, status: int) -> None:
    async def scenario() -> None:
        recorder, codes = Recorder(), list[str]()
        async with served(recorder) as server:
            server.on_refused = codes.append
            wire = await Wire.to(server.port)
            wire.send(sent + GET)
            got, headers, body = await wire.answer()
            assert got == status
            assert headers[b"connection"] == b"close"
            assert len(headers[b"x-request-id"]) == 32
            assert len(codes) == 1
            assert json.loads(body)["error"]["type"] == "invalid_request_error"
            assert await wire.rest() == b""
            assert recorder.requests == []
            await wire.close()

    on_uvloop(scenario)()


@pytest.mark.parametrize(("sent", "status"), [(b"GET / HT", 408), (POST[:-1], 408), (b"", None)])
def test_slow_clients_are_let_go_and_no_handler_runs(sent: bytes, status: int | None) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with served(recorder, QUICK) as server:
            wire = await Wire.to(server.port)
            wire.send(sent)
            if status is not None:
                assert (await wire.answer())[0] == status
            assert await wire.rest() == b""
            await wire.close()
            await until(lambda: server.connections == 0)
            assert recorder.requests == []

    on_uvloop(scenario)()


@on_uvloop
async def test_dripping_bytes_does_not_extend_the_deadline() -> None:
    async with served(Recorder(), QUICK) as server:
        wire = await Wire.to(server.port)
        head = asyncio.create_task(wire.answer())
        wire.send(b"GET / HTTP/1.1\r\n")
        while not head.done():
            wire.send(b"X: y\r\n")
            await asyncio.sleep(0.02)
        assert (await head)[0] == 408
        await wire.close()


@pytest.mark.parametrize("sent", [b"GET / HT", POST[:-1], b""])
def test_half_closed_before_the_request_is_whole_means_no_handler(sent: bytes) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        async with served(recorder) as server:
            wire = await Wire.to(server.port)
            wire.send(sent)
            wire.writer.write_eof()
            assert await wire.rest() == b""
            await wire.close()
            assert recorder.requests == []

    on_uvloop(scenario)()


@on_uvloop
async def test_an_idle_connection_is_closed() -> None:
    async with served(Recorder(), QUICK) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        assert (await wire.answer())[0] == 200
        assert await wire.rest() == b""
        await wire.close()


@on_uvloop
async def test_head_has_the_headers_and_no_body() -> None:
    async with served(Recorder()) as server:
        wire = await Wire.to(server.port)
        wire.send(GET.replace(b"GET", b"HEAD") + GET)
        status, headers = await wire.head()
        assert (status, headers[b"content-length"]) == (200, b"2")
        assert (await wire.answer())[2] == b"/x"
        await wire.close()


@on_uvloop
async def test_chunked_answer() -> None:
    async with served(stream_three) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        status, headers = await wire.head()
        assert (status, headers) == (200, {b"content-type": b"t", b"transfer-encoding": b"chunked"})
        assert await wire.reader.readuntil(b"0\r\n\r\n") == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n0\r\n\r\n"
        wire.send(GET.replace(b"GET", b"HEAD") + GET)
        assert (await wire.head())[0] == 200
        assert (await wire.head())[0] == 200
        await wire.close()


@on_uvloop
async def test_http_1_0_gets_the_payload_and_the_end_of_the_connection() -> None:
    async with served(stream_three) as server:
        wire = await Wire.to(server.port)
        wire.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"transfer-encoding" not in (await wire.head())[1]
        assert await wire.rest() == b"onetwothree"
        await wire.close()


@on_uvloop
async def test_http_1_0_is_kept_alive_when_it_asks() -> None:
    async with served(Recorder()) as server:
        wire = await Wire.to(server.port)
        wire.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert (await wire.answer())[1][b"connection"] == b"keep-alive"
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        assert (await wire.answer())[1][b"connection"] == b"close"
        assert await wire.rest() == b""
        await wire.close()


@on_uvloop
async def test_raw_chunks_are_taken_apart_for_http_1_0() -> None:
    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"transfer-encoding", b"chunked")], framing="raw")
        exchange.write(b"3\r\non")
        exchange.write(b"e\r\n0\r\n\r\n")
        exchange.end()

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        await wire.head()
        assert await wire.rest() == b"one"
        await wire.close()


@pytest.mark.parametrize("leave", ["close", "half-close", "reset"])
def test_a_client_that_leaves_is_told_to_the_handler_once(leave: str) -> None:
    async def scenario() -> None:
        calls: list[str] = []
        seen: list[Exchange] = []

        async def handler(request: Request, exchange: Exchange) -> None:
            gone = asyncio.Event()
            seen.append(exchange)

            def left() -> None:
                calls.append("gone")
                gone.set()

            exchange.on_disconnect = left
            exchange.start(200, [], framing="chunked")
            exchange.write(b"x")
            await gone.wait()
            exchange.write(b"y")
            exchange.end()

        async with served(handler) as server:
            wire = await Wire.to(server.port)
            wire.send(GET)
            await wire.head()
            if leave == "half-close":
                wire.writer.write_eof()
            elif leave == "reset":
                wire.writer.transport.abort()
            else:
                wire.writer.close()
            await until(lambda: server.inflight == 0 and server.connections == 0)
            assert calls == ["gone"]
            assert seen[0].disconnected
            seen[0].on_disconnect = lambda: calls.append("late")
            await until(lambda: calls == ["gone", "late"])
            await wire.close()

    on_uvloop(scenario)()


@on_uvloop
async def test_no_disconnect_is_told_after_the_end() -> None:
    calls: list[str] = []

    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.on_disconnect = lambda: calls.append("gone")
        exchange.respond(200)

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        await wire.answer()
        await wire.close()
        await until(lambda: server.connections == 0)
        assert calls == []


@on_uvloop
async def test_a_handler_that_raises_is_500_and_the_server_lives() -> None:
    async def handler(request: Request, exchange: Exchange) -> None:
        if request.path == "/x":
            raise ZeroDivisionError
        if request.path == "/started":
            exchange.start(200, [(b"content-length", b"5")], framing="raw")
            exchange.write(b"ab")
            raise ZeroDivisionError
        if request.path == "/forgot":
            return
        exchange.respond(200)

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        status, _, body = await wire.answer()
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        wire.send(GET.replace(b"/x", b"/forgot"))
        assert (await wire.answer())[0] == 500
        wire.send(GET.replace(b"/x", b"/fine"))
        assert (await wire.answer())[0] == 200
        wire.send(GET.replace(b"/x", b"/started"))
        await wire.head()
        assert await wire.rest() == b"ab"
        await wire.close()


@on_uvloop
async def test_abort_ends_a_chunked_answer_without_its_last_chunk_and_resets_http_1_0() -> None:
    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.start(200, [], framing="chunked")
        exchange.write(b"abc")
        await asyncio.sleep(0.02)
        exchange.abort()
        exchange.abort()
        exchange.write(b"no more")

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        await wire.head()
        assert await wire.rest() == b"3\r\nabc\r\n"
        await wire.close()
        wire = await Wire.to(server.port)
        wire.send(b"GET / HTTP/1.0\r\n\r\n")
        await wire.head()
        with pytest.raises(ConnectionResetError):
            await wire.rest()
        await wire.close()


@on_uvloop
async def test_misuse_of_an_exchange_is_an_error() -> None:
    messages: list[str] = []

    async def handler(request: Request, exchange: Exchange) -> None:
        with pytest.raises(RuntimeError) as caught:
            exchange.write(b"x")
        messages.append(str(caught.value))
        with pytest.raises(RuntimeError) as caught:
            exchange.end()
        messages.append(str(caught.value))
        exchange.start(204, [], framing="chunked")
        with pytest.raises(RuntimeError) as caught:
            exchange.respond(200)
        messages.append(str(caught.value))
        exchange.end()

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET + GET)
        assert await wire.head() == (204, {})
        assert await wire.head() == (204, {})
        assert len(messages) == 6
        await wire.close()
