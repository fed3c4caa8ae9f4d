"""Clients that read slowly or not at all: nothing piles up, and nothing they still take is cut."""

from __future__ import annotations

import asyncio

import pytest

from dynctl.http import connection
from dynctl.http.server import Exchange, Request
from tests.contract.http_wire import GET, QUICK, Wire, on_uvloop, served, until

pytestmark = pytest.mark.usefixtures("each_relay")


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
        assert await _body(wire) > total
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


def test_a_last_answer_is_not_cut_while_the_client_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_S", 0.02)
    size = 30_000_000

    async def handler(request: Request, exchange: Exchange) -> None:
        exchange.respond(200, b"x" * size)

    async def scenario() -> None:
        async with served(handler) as server:
            wire = await Wire.to(server.port)
            wire.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            await wire.head()
            got = 0
            while data := await wire.reader.read(size // 20):
                got += len(data)
                await asyncio.sleep(0.005)
            assert got == size
            await wire.close()
            await until(lambda: server.connections == 0)

    on_uvloop(scenario)()


@on_uvloop
async def test_a_pipelining_client_that_reads_nothing_is_not_served_on() -> None:
    answered = 0

    async def handler(request: Request, exchange: Exchange) -> None:
        nonlocal answered
        answered += 1
        exchange.respond(200, b"x" * 1_000_000)

    async with served(handler) as server:
        wire = await Wire.to(server.port)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(GET * 30)
        await until(lambda: any(one.write_paused for one in server._connections))
        before = answered
        assert before < 30
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(30):
            assert len((await wire.answer())[2]) == 1_000_000
        await wire.close()
