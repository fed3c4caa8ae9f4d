"""What the HTTP tests share: a scenario on the product's own loop, a client of raw bytes, a scripted peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.runtime import run
from dynctl.http.server import Exchange, Limits, Request, Server, serve

DEADLINE_S = 20.0
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TIMEOUTS = Timeouts(connect_s=5, first_byte_s=5, stall_s=5)
QUICK = Limits(header_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2, body_bytes=100)
GET = b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def on_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test that runs this coroutine on uvloop, within a deadline."""

    def test() -> None:
        run(asyncio.wait_for(scenario(), DEADLINE_S))

    test.__name__ = scenario.__name__
    test.__doc__ = scenario.__doc__
    return test


class Wire:
    """Raw bytes to a port and back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def to(cls, port: int) -> Wire:
        """Connect."""
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, data: bytes) -> None:
        """Send bytes."""
        self.writer.write(data)

    async def answer(self) -> tuple[int, dict[bytes, bytes], bytes]:
        """One answer with content-length: status, headers, body."""
        status, headers = await self.head()
        body = await self.reader.readexactly(int(headers.get(b"content-length", b"0")))
        return status, headers, body

    async def head(self) -> tuple[int, dict[bytes, bytes]]:
        """The head of one answer."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        headers = dict(line.split(b": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def rest(self) -> bytes:
        """Everything until the other side closes."""
        return await self.reader.read()

    async def close(self) -> None:
        """Close and wait for it."""
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


async def until(condition: Callable[[], bool]) -> None:
    """Poll until this holds; the scenario's deadline bounds it."""
    while not condition():  # noqa: ASYNC110  # the condition is another process's or task's plain state
        await asyncio.sleep(0.005)


async def stream_three(request: Request, exchange: Exchange) -> None:
    """Answer in three chunks."""
    exchange.start(200, [(b"content-type", b"t"), (b"connection", b"bogus")], framing="chunked")
    for piece in (b"one", b"", b"two", b"three"):
        exchange.write(piece)
    exchange.end()
    exchange.end()


class Recorder:
    """A handler that keeps the requests it was given and answers each with its path."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    async def __call__(self, request: Request, exchange: Exchange) -> None:
        self.requests.append(request)
        exchange.respond(200, request.path.encode(), content_type=b"text/plain")


@asynccontextmanager
async def served(
    handler: Callable[[Request, Exchange], Awaitable[None]], limits: Limits | None = None
) -> AsyncGenerator[Server, None]:
    """A server on a free port."""
    server = await serve(handler, host="127.0.0.1", port=0, limits=limits or Limits())
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def scripted(script: Script) -> AsyncGenerator[int, None]:
    """A peer that does to each connection what the script says; gives its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            return  # the other side cut the connection, as some tests want
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(play(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def here(port: int) -> Origin:
    return Origin("http", "127.0.0.1", port)


@asynccontextmanager
async def client(
    *,
    idle_expiry_s: float = 4.0,
    max_idle: int = 256,
    header_bytes: int = 65536,
    body_bytes: int = 1 << 26,
    resend: bool = True,
) -> AsyncGenerator[Client, None]:
    one = Client(
        idle_expiry_s=idle_expiry_s,
        max_idle=max_idle,
        header_bytes=header_bytes,
        body_bytes=body_bytes,
        resend=resend,
    )
    try:
        yield one
    finally:
        await one.close()


def saying(*pieces: bytes, close: bool = False) -> Script:
    """A peer that answers every request with these bytes, a turn of the loop between each."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"content-length: " in head:
                await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r\n")[0]))
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.002)
            if close:
                return

    return script
