"""Clients that reset, read in bits or are left halfway, chunks of all sizes: the whole relay, both ways."""

from __future__ import annotations

import asyncio
import random
import socket
import struct

import pytest

from dynctl.http.client import Client
from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.http.relay import relay
from dynctl.http.server import Exchange, Request
from dynctl.http.upstream import LONG_PIECES
from tests.contract.http_wire import (
    CHUNKED,
    GET,
    TIMEOUTS,
    Wire,
    client,
    here,
    on_uvloop,
    scripted,
    served,
    until,
)

pytestmark = pytest.mark.usefixtures("each_relay")

TOKEN = frame_chunk(b'data: {"text": "a token"}\n\n')


async def endless(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
    """An engine that streams for as long as it is let."""
    await reader.readuntil(b"\r\n\r\n")
    out.write(CHUNKED)
    while True:
        out.write(TOKEN * 20)
        await out.drain()
        await asyncio.sleep(0)


@on_uvloop
async def test_clients_that_reset_amid_a_stream_harm_no_other() -> None:
    """Descriptors are given out anew at once: none may be written to for a connection that had it before."""
    number = 0
    chunk = frame_chunk(b"%06d" % 0 * 50)

    async def script(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        nonlocal number
        await reader.readuntil(b"\r\n\r\n")
        number += 1
        mine = frame_chunk(b"%06d" % number * 50)
        out.write(CHUNKED)
        while True:
            out.write(mine)
            await out.drain()
            await asyncio.sleep(0.0005)

    async with (
        scripted(script) as upstream,
        client() as one,
        served(lambda request, exchange: passed_on(one, upstream, exchange)) as server,
    ):
        for turn in range(60):
            wire = await Wire.to(server.port)
            wire.send(GET)
            await wire.head()
            got = await wire.reader.readexactly(len(chunk) * (LONG_PIECES + 6))
            assert len({got[i : i + len(chunk)] for i in range(0, len(got), len(chunk))}) == 1
            if turn % 2:
                sock = wire.writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wire.writer.transport.abort()
        await until(lambda: not one._open)


async def passed_on(one: Client, upstream: int, exchange: Exchange) -> None:
    await relay(await one.open(here(upstream), "GET", "/x", timeouts=TIMEOUTS), exchange)


@on_uvloop
async def test_huge_chunks_between_small_ones_reach_a_client_that_reads_in_bits() -> None:
    rng = random.Random(2)
    chunks = [TOKEN] * 8
    for _ in range(6):
        chunks += [frame_chunk(rng.randbytes(rng.choice([1, 65_536, 65_529, 131_072, 3_000_000]))), TOKEN]
    body = b"".join(chunks) + LAST_CHUNK

    async def script(reader: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        out.write(CHUNKED)
        place = 0
        while place < len(body):
            size = rng.choice([1, 7, 300, 65_536, 200_000])
            out.write(body[place : place + size])
            place += size
            await out.drain()
            await asyncio.sleep(0)

    async with scripted(script) as upstream, client() as one:

        async def handler(request: Request, exchange: Exchange) -> None:
            await passed_on(one, upstream, exchange)

        async with served(handler) as server:
            wire = await Wire.to(server.port)
            sock = wire.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            wire.send(GET)
            await wire.head()
            got = bytearray()
            while len(got) < len(body):
                got += await wire.reader.read(rng.choice([1, 100, 50_000]))
            assert got == body
            await wire.close()


@on_uvloop
async def test_a_server_that_ends_amid_many_streams_leaves_nothing_open() -> None:
    async with scripted(endless) as upstream, client() as one:
        async with served(lambda request, exchange: passed_on(one, upstream, exchange)) as server:
            wires = [await Wire.to(server.port) for _ in range(20)]
            for wire in wires:
                wire.send(GET)
                await wire.head()
                await wire.reader.readexactly(len(TOKEN) * 200)
        await until(lambda: not one._open)
        assert one.readers._ready == {}
        for wire in wires:
            wire.writer.transport.abort()
