"""The bare relay between the server and the client: every framing, and either side's leaving or slowness."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from dynctl.errors import PeerLost
from dynctl.http.client import Client, Stream
from dynctl.http.framing import frame_chunk
from dynctl.http.relay import relay
from dynctl.http.server import Exchange, Request
from tests.contract.http_wire import (
    CHUNKED,
    GET,
    OK,
    TIMEOUTS,
    Script,
    Wire,
    client,
    here,
    on_uvloop,
    saying,
    scripted,
    served,
    until,
)

pytestmark = pytest.mark.usefixtures("each_relay")


@asynccontextmanager
async def relayed(script: Script, streams: list[Stream]) -> AsyncGenerator[tuple[int, Client], None]:
    """A relay in front of a scripted peer: its port and its client."""
    async with scripted(script) as upstream, client() as one:

        async def handler(request: Request, exchange: Exchange) -> None:
            stream = await one.open(here(upstream), request.method, request.target, timeouts=TIMEOUTS)
            streams.append(stream)
            try:
                await relay(stream, exchange, [(b"x-by", b"relay")])
            except PeerLost:
                assert not stream.complete

        async with served(handler) as server:
            yield server.port, one


@pytest.mark.parametrize(
    ("pieces", "close", "expected"),
    [
        ((CHUNKED, frame_chunk(b"abc"), b"0\r\n\r\n"), False, b"3\r\nabc\r\n0\r\n\r\n"),
        (
            (OK + b"X-By: you\r\nConnection: x-hop\r\nX-Hop: 1\r\nContent-Length: 3\r\n\r\nabc",),
            False,
            b"abc",
        ),
        ((OK + b"\r\nabc",), True, b"3\r\nabc\r\n0\r\n\r\n"),
    ],
)
def test_a_relay_passes_every_framing_on(pieces: tuple[bytes, ...], close: bool, expected: bytes) -> None:
    async def scenario() -> None:
        async with relayed(saying(*pieces, close=close), []) as (port, _):
            wire = await Wire.to(port)
            for _ in range(2):
                wire.send(GET)
                status, headers = await wire.head()
                assert (status, headers[b"x-by"], headers.get(b"x-hop")) == (200, b"relay", None)
                assert await wire.reader.readexactly(len(expected)) == expected
            await wire.close()

    on_uvloop(scenario)()


@on_uvloop
async def test_a_relay_cuts_the_client_when_the_upstream_is_lost() -> None:
    async with relayed(saying(CHUNKED, frame_chunk(b"abc"), close=True), []) as (port, _):
        wire = await Wire.to(port)
        wire.send(GET)
        await wire.head()
        assert await wire.rest() == frame_chunk(b"abc")
        await wire.close()


@on_uvloop
async def test_a_relay_aborts_the_upstream_when_the_client_leaves() -> None:
    streams: list[Stream] = []
    async with relayed(saying(CHUNKED + frame_chunk(b"abc")), streams) as (port, one):
        wire = await Wire.to(port)
        wire.send(GET)
        await wire.head()
        await wire.close()
        await until(lambda: not one._open)
        assert streams[0].ended
        assert not streams[0].complete


@on_uvloop
async def test_a_relay_pauses_the_upstream_while_the_client_reads_nothing() -> None:
    sent = 0
    total = 60

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % (total * 1_000_000))
        for _ in range(total):
            writer.write(b"x" * 1_000_000)
            await writer.drain()
            sent += 1
        await reader.read()

    async with relayed(script, []) as (port, one):
        wire = await Wire.to(port)
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]
        wire.send(GET)
        await until(lambda: any(connection._paused for connection in one._open))
        assert sent < total
        wire.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await wire.head()
        assert len(await wire.reader.readexactly(total * 1_000_000)) == total * 1_000_000
        await wire.close()
