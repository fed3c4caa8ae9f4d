"""A server's life: limits, drain, close, ports, TLS."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from pathlib import Path

import pytest

from dynctl.errors import LaunchError, PortInUse
from dynctl.http.runtime import run
from dynctl.http.server import Exchange, Limits, Request, serve
from tests.certificates import make_certificate
from tests.contract.http_wire import GET, QUICK, Recorder, Wire, on_uvloop, served, stream_three, until


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
async def test_a_patient_drain_answers_what_clients_were_about_to_send() -> None:
    release = asyncio.Event()

    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.start(200, [], framing="chunked")
        exchange.write(b"a")
        await release.wait()
        exchange.end()

    async with served(handler) as server:
        idle, silent, busy = [await Wire.to(server.port) for _ in range(3)]
        busy.send(GET)
        status, headers = await busy.head()
        assert (status, b"connection" in headers) == (200, False)
        draining = asyncio.create_task(server.drain(10, idle_s=0.3))
        await until(lambda: server.draining)
        release.set()
        idle.send(GET)
        status, headers = await idle.head()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert await idle.rest() == b"1\r\na\r\n0\r\n\r\n"
        await busy.reader.readuntil(b"0\r\n\r\n")
        busy.send(GET)
        status, headers = await busy.head()
        assert (status, headers[b"connection"]) == (200, b"close"), "its last answer had not said so"
        await busy.rest()
        assert await silent.rest() == b""
        assert await draining == 0
        for wire in (idle, silent, busy):
            await wire.close()


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


@pytest.mark.debian("openssl")
def test_tls(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path)
    run(asyncio.wait_for(_tls_scenario(cert, key), 20))


async def _tls_scenario(cert: Path, key: Path) -> None:
    from dynctl.http.client import Client, Origin

    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(cert, key)
    there = ssl.create_default_context(cafile=str(cert))
    server = await serve(stream_three, host="127.0.0.1", port=0, limits=Limits(body_bytes=100), tls=here)
    client = Client(tls=there)
    origin = Origin.parse(f"https://127.0.0.1:{server.port}")
    for _ in range(2):
        response = await client.request(origin, "GET", "/", timeout_s=5)
        assert response.body == b"onetwothree"
    too_long = await client.request(origin, "POST", "/", body=b"x" * 101, timeout_s=5)
    assert too_long.status == 413
    await client.close()
    await server.close()


@pytest.mark.debian("openssl")
def test_a_client_that_never_ends_its_tls_handshake_is_let_go(tmp_path: Path) -> None:
    """Nor one that ends it and then drips: the deadlines of plain HTTP hold inside TLS."""
    cert, key = make_certificate(tmp_path)
    run(asyncio.wait_for(_slow_tls_scenario(cert, key), 20))


async def _slow_tls_scenario(cert: Path, key: Path) -> None:
    here = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    here.load_cert_chain(cert, key)
    server = await serve(Recorder(), host="127.0.0.1", port=0, limits=QUICK, tls=here)
    silent = await Wire.to(server.port)
    hello = await Wire.to(server.port)
    hello.send(b"\x16\x03\x01\x02\x00\x01")
    there = ssl.create_default_context(cafile=str(cert))
    slow = Wire(*await asyncio.open_connection("127.0.0.1", server.port, ssl=there))
    slow.send(b"POST /x HTTP/1.1\r\nHost:")
    for wire in (silent, hello):
        with suppress(ConnectionError):
            assert await wire.rest() == b""
    assert b"408" in await slow.rest()
    for wire in (silent, hello, slow):
        await wire.close()
    await until(lambda: server.connections == 0)
    await server.close()
