"""Long bodies, which are read and written past the transports: nothing that the transports do is lost."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import cast

import pytest

from dynctl.errors import DeadlineExceeded, PeerLost
from dynctl.http import direct
from dynctl.http.client import Client, Stream
from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.http.relay import relay
from dynctl.http.server import Exchange, Request
from dynctl.http.upstream import LONG_PIECES
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
    scripted,
    served,
    until,
)

pytestmark = pytest.mark.usefixtures("each_relay")

MANY = LONG_PIECES + 4
Ending = Callable[[asyncio.StreamWriter], None]


class Pieces:
    """A sink that asks the peer for the next piece when it has one, so that each comes by itself."""

    def __init__(self) -> None:
        self.taken: list[bytes] = []
        self.more = asyncio.Event()

    def feed(self, data: bytes) -> None:
        self.taken.append(data)
        self.more.set()


def one_by_one(sink: Pieces, head: bytes, pieces: list[bytes], ending: Ending) -> Script:
    """A peer that sends each piece when the one before it has been taken, and then ends as told."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            await writer.drain()
            for piece in pieces:
                sink.more.clear()
                writer.write(piece)
                await sink.more.wait()
            ending(writer)
            await writer.drain()

    return script


def tokens(count: int = MANY) -> list[bytes]:
    return [frame_chunk(b"token %d" % number) for number in range(count)]


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def with_stream(script: Script, use: Callable[[Stream, Client], Awaitable[None]]) -> None:
    async with scripted(script) as port, client() as one:
        stream = await one.open(here(port), "GET", "/x", timeouts=TIMEOUTS)
        await use(stream, one)


@on_uvloop
async def test_a_connection_that_carried_a_long_body_serves_on_and_its_end_is_seen() -> None:
    sink = Pieces()
    script = one_by_one(sink, CHUNKED, tokens(), lambda writer: writer.write(LAST_CHUNK))
    async with scripted(script) as port, client() as one:
        for _ in range(3):
            stream = await one.open(here(port), "GET", "/x", timeouts=TIMEOUTS)
            await stream.relay(sink)
            assert stream.complete
        assert b"".join(sink.taken) == (b"".join(tokens()) + LAST_CHUNK) * 3
        assert len(one._open) == 1
        assert one.readers._ready == {}
    await until(lambda: not one._open)


@pytest.mark.parametrize("ending", [reset, lambda writer: writer.close()])
def test_a_peer_lost_amid_a_long_body_is_told(ending: Ending) -> None:
    async def scenario() -> None:
        sink = Pieces()

        async def use(stream: Stream, one: Client) -> None:
            with pytest.raises(PeerLost, match="before its answer had ended"):
                await stream.relay(sink)
            assert sink.taken == tokens()
            await until(lambda: not one._open)

        await with_stream(one_by_one(sink, CHUNKED, tokens(), ending), use)

    on_uvloop(scenario)()


@on_uvloop
async def test_an_end_that_comes_together_with_the_last_bytes_is_seen() -> None:
    sink, last = Pieces(), frame_chunk(b"last")

    def last_words(writer: asyncio.StreamWriter) -> None:
        own = direct.own_socket(cast(asyncio.Transport, writer.transport))
        assert own is not None
        with own:
            own.send(last)
            own.shutdown(socket.SHUT_WR)  # both are there before the reader looks

    async def use(stream: Stream, one: Client) -> None:
        with pytest.raises(PeerLost, match="before its answer had ended"):
            async with asyncio.timeout(TIMEOUTS.stall_s / 2):
                await stream.relay(sink)
        assert sink.taken == [*tokens(), last]
        await until(lambda: not one._open)

    await with_stream(one_by_one(sink, CHUNKED, tokens(), last_words), use)


@on_uvloop
async def test_a_long_body_may_end_with_its_connection() -> None:
    sink = Pieces()

    async def use(stream: Stream, one: Client) -> None:
        await stream.relay(sink)
        assert stream.complete
        assert sink.taken == tokens()

    await with_stream(one_by_one(sink, OK + b"\r\n", tokens(), lambda writer: writer.close()), use)


@on_uvloop
async def test_a_long_body_that_breaks_its_framing_is_a_lost_peer() -> None:
    sink = Pieces()

    async def use(stream: Stream, one: Client) -> None:
        with pytest.raises(PeerLost, match="breaks HTTP"):
            await stream.relay(sink)

    await with_stream(one_by_one(sink, CHUNKED, tokens(), lambda writer: writer.write(b"zz\r\n")), use)


@on_uvloop
async def test_what_a_sink_raises_late_reaches_whoever_relays() -> None:
    class Broken(Pieces):
        def feed(self, data: bytes) -> None:
            super().feed(data)
            if len(self.taken) == MANY:
                raise ZeroDivisionError("the sink's own")

    sink = Broken()

    async def use(stream: Stream, one: Client) -> None:
        with pytest.raises(ZeroDivisionError):
            await stream.relay(sink)
        await until(lambda: not one._open)

    await with_stream(one_by_one(sink, CHUNKED, tokens(MANY + 1), lambda writer: None), use)


@on_uvloop
async def test_a_long_body_rests_while_paused_and_loses_nothing() -> None:
    class Pausing(Pieces):
        def feed(self, data: bytes) -> None:
            super().feed(data)
            if len(self.taken) == MANY:
                streams[0].pause()

    streams: list[Stream] = []
    sink = Pausing()
    tail = [b"x%07d" % number for number in range(40_000)]
    script = one_by_one(
        sink, CHUNKED, tokens(), lambda writer: writer.write(frame_chunk(b"".join(tail)) + LAST_CHUNK)
    )

    async def use(stream: Stream, one: Client) -> None:
        streams.append(stream)
        relaying = asyncio.create_task(stream.relay(sink))
        await until(lambda: len(sink.taken) >= MANY)
        await asyncio.sleep(0.05)
        assert len(sink.taken) == MANY
        stream.resume()
        await relaying
        assert b"".join(sink.taken) == b"".join(tokens()) + frame_chunk(b"".join(tail)) + LAST_CHUNK

    await with_stream(script, use)


@on_uvloop
async def test_very_many_pieces_are_read_from_time_to_time_and_few_at_once() -> None:
    sink = Pieces()
    script = one_by_one(sink, CHUNKED, tokens(3_000), lambda writer: None)
    async with scripted(script) as port, client() as one:
        one.readers.rest_s = 0.001
        stream = await one.open(here(port), "GET", "/x", timeouts=TIMEOUTS)
        relaying = asyncio.create_task(stream.relay(sink))
        for rate in (direct.BUSY_READS / 0.001 * 2, direct.BUSY_READS / 0.001 / 2):
            one.readers._rate = lambda rate=rate: rate  # type: ignore[method-assign,misc]
            await until(lambda: one.readers.resting)
            taken = len(sink.taken)
            await until(lambda taken=taken: len(sink.taken) > taken + 5)  # type: ignore[misc]
            assert one.readers.resting
        one.readers._rate = lambda: 0.0  # type: ignore[method-assign]
        await until(lambda: not one.readers.resting)
        taken = len(sink.taken)
        await until(lambda: len(sink.taken) > taken + 5)
        stream.abort()
        with pytest.raises(PeerLost):
            await relaying
    assert b"".join(tokens(3_000)).startswith(b"".join(sink.taken))


@on_uvloop
async def test_a_client_that_reads_slowly_gets_every_byte_in_order() -> None:
    chunks = [frame_chunk(b"%08d" % number * 500) for number in range(3_000)]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        writer.write(LAST_CHUNK)

    async with scripted(script) as upstream, client() as one:

        async def handler(request: Request, exchange: Exchange) -> None:
            await relay(await one.open(here(upstream), "GET", "/x", timeouts=TIMEOUTS), exchange)

        async with served(handler) as server:
            wire = await Wire.to(server.port)
            wire.send(GET)
            await wire.head()
            expected = b"".join(chunks) + LAST_CHUNK
            got = bytearray()
            while len(got) < len(expected):
                if len(got) < 2_000_000:
                    await asyncio.sleep(0.005)
                got += await wire.reader.read(20_000 if len(got) < 2_000_000 else 1 << 20)
            assert got == expected
            await wire.close()


@on_uvloop
async def test_a_stream_that_goes_on_has_not_stalled_and_one_that_stops_has() -> None:
    stall_s = 0.3

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(CHUNKED)
        for chunk in tokens(40):
            writer.write(chunk)
            await asyncio.sleep(stall_s / 10)
        await asyncio.sleep(20 * stall_s)

    sink = Pieces()
    async with scripted(script) as port, client() as one:
        timeouts = replace(TIMEOUTS, stall_s=stall_s)
        stream = await one.open(here(port), "GET", "/x", timeouts=timeouts)
        with pytest.raises(DeadlineExceeded, match="stalled"):
            await stream.relay(sink)
    assert b"".join(sink.taken) == b"".join(tokens(40))
