"""Clients that keep asking a shared port, each on its own connection, and see who answers and what breaks."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

REQUESTS_A_CONNECTION = 8
DEADLINE_S = 15.0


@dataclass
class Client:
    """`at`: the frontend that its connection leads to, "" = not known yet; None = it has no connection."""

    number: int
    at: str | None = None


@dataclass
class Load:
    """What happened so far. `broken` counts requests cut or refused by where their connection led to."""

    url: str
    clients: list[Client]
    done: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    hung: int = 0
    ending: bool = False

    def held_by(self, frontend: str) -> int:
        """Clients whose connection leads there."""
        return sum(client.at == frontend for client in self.clients)

    def answered(self) -> int:
        """Requests answered as they should be."""
        return self.done.total()

    def __str__(self) -> str:
        counts = f"{self.answered()} answered {dict(self.done)}, broken {dict(self.broken)}"
        return f"{counts}, {len(self.wrong)} wrong, {self.hung} hung"


@asynccontextmanager
async def steady_load(url: str, clients: int) -> AsyncIterator[Load]:
    """Until the block is left, then every request is let end."""
    load = Load(url, [Client(number) for number in range(clients)])
    tasks = [asyncio.create_task(_ask_on(load, client)) for client in load.clients]
    try:
        yield load
    finally:
        load.ending = True
        await asyncio.wait_for(asyncio.gather(*tasks), 2 * DEADLINE_S)


async def _ask_on(load: Load, client: Client) -> None:
    while not load.ending:
        client.at = ""
        try:
            await _connection(load, client)
        except TimeoutError:
            load.hung += 1
        except (OSError, EOFError):
            load.broken[client.at] += 1
        client.at = None


async def _connection(load: Load, client: Client) -> None:
    """Ask who is at the other end, then for completions, then begin anew."""
    parts = urlsplit(load.url)
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        async with asyncio.timeout(DEADLINE_S):
            body, closes = await _exchange(reader, writer, "GET", "/health", b"")
        health = json.loads(body)
        client.at = str(health["frontend"])
        for number in range(REQUESTS_A_CONNECTION):
            if load.ending or closes:
                return
            prompt = f"client {client.number} says {number % 3} " + "word " * 40
            asked = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "stream": True}
            async with asyncio.timeout(DEADLINE_S):
                text = json.dumps(asked).encode()
                answer, closes = await _exchange(reader, writer, "POST", "/v1/completions", text)
            if answer.endswith(b"data: [DONE]\n\n") and answer.count(b'"text"') >= 8:
                load.done[client.at] += 1
            else:
                load.wrong.append(answer[-300:].decode(errors="replace"))
    finally:
        writer.transport.abort()


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, body: bytes
) -> tuple[bytes, bool]:
    """The body of the answer, and whether it is the connection's last one.

    Raises EOFError or OSError when the connection breaks before its end.
    """
    head = f"{method} {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    told = (await reader.readuntil(b"\r\n\r\n")).lower()
    closes = b"connection: close" in told
    if b"transfer-encoding: chunked" not in told:
        length = int(told.partition(b"content-length:")[2].split(b"\r\n")[0])
        return await reader.readexactly(length), closes
    found = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        found += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return found, closes
