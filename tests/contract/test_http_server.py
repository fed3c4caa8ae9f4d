"""The server as clients see it: well-behaved, slow, broken and hostile ones."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from dynctl.errors import LaunchError, PortInUse
from dynctl.http.framing import frame_chunk
from dynctl.http.runtime import run
from dynctl.http.server import Exchange, Limits, Request, serve
from tests.contract.http_wire import GET, Recorder, Wire, on_uvloop, served, until

POST = b"POST /p HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"
QUICK = Limits(header_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2, body_bytes=100)


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
        (connection,) = server._connections
        await until(lambda: connection._read_paused)
        assert connection._reader.buffered < 1_000_000
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
    async with served(recorder, QUICK) as server:
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
    async with served(Recorder(), QUICK) as server:
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
        recorder = Recorder()
        async with served(recorder) as server:
            wire = await Wire.to(server.port)
            wire.send(sent)
            got, headers, body = await wire.answer()
            assert got == status
            assert headers[b"connection"] == b"close"
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


async def stream_three(request: Request, exchange: Exchange) -> None:
    """Answer in three chunks."""
    exchange.start(200, [(b"content-type", b"t"), (b"connection", b"bogus")], framing="chunked")
    for piece in (b"one", b"", b"two", b"three"):
        exchange.write(piece)
    exchange.end()
    exchange.end()


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
            exchange.on_disconnect = lambda: (calls.append("gone"), gone.set())[1]  # type: ignore[func-returns-value]
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
async def test_a_client_that_reads_slowly_pauses_the_writer() -> None:
    events: list[str] = []
    total = 0

    async def handler(request: Request, exchange: Exchange) -> None:
        nonlocal total
        exchange.on_pause = lambda: events.append("pause")
        exchange.on_resume = lambda: events.append("resume")
        exchange.start(200, [], framing="chunked")
        await exchange.drained()
        while "pause" not in events:
            exchange.write(b"x" * 100_000)
            total += 100_000
            await asyncio.sleep(0)
        await exchange.drained()
        assert "resume" in events
        exchange.end()

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        await until(lambda: "pause" in events)
        await wire.head()
        data = await wire.reader.readuntil(b"\r\n0\r\n\r\n") if total < 60_000 else await _body(wire)
        assert data >= total
        await wire.close()


async def _body(wire: Wire) -> int:
    """Bytes of a chunked body of 100 kB chunks, framing included."""
    size = 0
    tail = b""
    while not tail.endswith(b"0\r\n\r\n"):
        data = await wire.reader.read(1 << 20)
        assert data
        size += len(data)
        tail = (tail + data)[-8:]
    return size


@on_uvloop
async def test_a_client_that_takes_nothing_is_cut_off() -> None:
    gone: list[bool] = []

    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.start(200, [], framing="chunked")
        while not exchange.disconnected:
            exchange.write(b"x" * 1_000_000)
            await exchange.drained()
        gone.append(True)

    async with served(handler, QUICK) as server:
        wire = await Wire.to(server.port)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(GET)
        await until(lambda: gone == [True])
        assert server.inflight <= 1
        wire.writer.transport.abort()


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
        for misuse in (lambda: exchange.write(b"x"), exchange.end):
            with pytest.raises(RuntimeError) as caught:
                misuse()
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


@on_uvloop
async def test_one_connection_too_many_is_told_so() -> None:
    async with served(Recorder(), Limits(max_connections=1)) as server:
        first = await Wire.to(server.port)
        first.send(GET)
        await first.answer()
        second = await Wire.to(server.port)
        assert (await second.answer())[0] == 503
        assert await second.rest() == b""
        await second.close()
        first.send(GET)
        assert (await first.answer())[0] == 200
        await first.close()


@on_uvloop
async def test_drain_lets_requests_finish_and_closes_the_rest() -> None:
    release = asyncio.Event()

    async def handler(request: Request, exchange: Exchange) -> None:
        await release.wait()
        exchange.respond(200)

    async with served(handler) as server:
        idle, busy = await Wire.to(server.port), await Wire.to(server.port)
        busy.send(GET)
        await until(lambda: server.inflight == 1)
        assert await server.drain(0.02) == 1
        assert await idle.rest() == b""
        with pytest.raises(OSError, match="Connect"):
            await Wire.to(server.port)
        draining = asyncio.create_task(server.drain(10))
        release.set()
        status, headers, _ = await busy.answer()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert await busy.rest() == b""
        assert await draining == 0
        assert await server.drain(0) == 0
        await idle.close()
        await busy.close()


@on_uvloop
async def test_close_cancels_handlers_and_cuts_connections() -> None:
    cancelled: list[bool] = []

    async def handler(request: Request, exchange: Exchange) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append(True)

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.send(GET)
        await until(lambda: server.inflight == 1)
        await server.close()
        assert cancelled == [True]
        assert await wire.rest() == b""
        await wire.close()


@on_uvloop
async def test_a_port_in_use_is_named_and_can_be_shared_when_asked() -> None:
    async with served(Recorder()) as server:
        with pytest.raises(PortInUse) as caught:
            await serve(Recorder(), host="127.0.0.1", port=server.port, limits=Limits())
        assert caught.value.where == f"127.0.0.1:{server.port}"
    with pytest.raises(LaunchError) as other:
        await serve(Recorder(), host="192.0.2.1", port=0, limits=Limits())
    assert other.value.where == "192.0.2.1:0"
    one = await serve(Recorder(), host="127.0.0.1", port=0, limits=Limits(), reuse_port=True)
    two = await serve(Recorder(), host="127.0.0.1", port=one.port, limits=Limits(), reuse_port=True)
    assert one.port == two.port
    await one.close()
    await two.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command for a certificate")
def test_tls(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    out = ["-keyout", str(key), "-out", str(cert)]
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subprocess.run([*argv, "-days", "2", *name, *out], check=True, capture_output=True)
    run(asyncio.wait_for(_tls_scenario(cert, key), 20))


async def _tls_scenario(cert: Path, key: Path) -> None:
    from dynctl.http.client import Client, Origin

    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(cert, key)
    there = ssl.create_default_context(cafile=str(cert))
    server = await serve(stream_three, host="127.0.0.1", port=0, limits=QUICK, tls=here)
    client = Client(tls=there)
    origin = Origin.parse(f"https://127.0.0.1:{server.port}")
    for _ in range(2):
        response = await client.request(origin, "GET", "/", timeout_s=5)
        assert response.body == b"onetwothree"
    too_long = await client.request(origin, "POST", "/", body=b"x" * 101, timeout_s=5)
    assert too_long.status == 413
    await client.close()
    await server.close()
