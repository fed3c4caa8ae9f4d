"""A mocker as its own process, and short ways to talk to it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from dynctl.engines.prometheus import samples
from dynctl.http.client import Client, Origin, Response, Stream, Timeouts

DEADLINE_S = 30.0
_READY = re.compile(r"engine\.ready .*url=http://([\d.]+):(\d+)")


class MockerProcess:
    """One running mocker."""

    def __init__(self, process: asyncio.subprocess.Process, client: Client) -> None:
        self.process = process
        self.client = client
        self.origin = Origin("http", "127.0.0.1", 0)
        self.log: list[str] = []

    async def ready(self) -> None:
        """Read the log until it listens."""
        assert self.process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            async for line in self.process.stderr:
                self.log.append(line.decode())
                if match := _READY.search(self.log[-1]):
                    self.origin = Origin("http", match.group(1), int(match.group(2)))
                    return
        raise AssertionError(f"the mocker did not start: {''.join(self.log)}")

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Response:
        """A whole answer."""
        raw = b"" if body is None else json.dumps(body).encode()
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return await self.client.request(
            self.origin, method, path, headers=pairs, body=raw, timeout_s=DEADLINE_S
        )

    async def post(self, path: str, body: Any, **headers: str) -> dict[str, Any]:
        """The JSON of an answer that must be 200."""
        response = await self.call("POST", path, body, **headers)
        assert response.status == 200, response.body
        answer: dict[str, Any] = json.loads(response.body)
        return answer

    async def get(self, path: str) -> Any:
        """The JSON of a path that must answer 200."""
        response = await self.call("GET", path)
        assert response.status == 200, response.body
        return json.loads(response.body)

    async def open(self, path: str, body: Any) -> Stream:
        """A stream, once its head is there."""
        timeouts = Timeouts(connect_s=DEADLINE_S, first_byte_s=DEADLINE_S, stall_s=DEADLINE_S)
        raw = json.dumps({**body, "stream": True}).encode()
        return await self.client.open(self.origin, "POST", path, body=raw, timeouts=timeouts)

    async def events(self, path: str, body: Any) -> list[dict[str, Any]]:
        """All events of a stream; the last one must have been [DONE]."""
        stream = await self.open(path, body)
        assert stream.status == 200
        return sse(await stream.read(1 << 24))

    async def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        page = (await self.call("GET", "/metrics")).body
        found = [s for s in samples(page, [name]) if labels.items() <= s.labels.items()]
        return sum(sample.value for sample in found)

    async def until(self, wanted: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """Poll the first rank's state until `wanted(state)`; the state."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                state: dict[str, Any] = (await self.get("/mock/state"))["ranks"][0]
                if wanted(state):
                    return state
                await asyncio.sleep(0.01)

    async def exit_code(self) -> int:
        """Wait for its end."""
        async with asyncio.timeout(DEADLINE_S):
            _, rest = await self.process.communicate()
        self.log.append(rest.decode())
        assert self.process.returncode is not None
        return self.process.returncode


def sse(body: bytes) -> list[dict[str, Any]]:
    """The JSON events of a complete stream."""
    parts = [part.removeprefix("data: ") for part in body.decode().split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """What a streamed choice said."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"]["content"] if "delta" in choice else choice["text"] for choice in choices)


@asynccontextmanager
async def mocker(*flags: str, ready: bool = True) -> AsyncIterator[MockerProcess]:
    """Start one on a free port; it is gone afterwards."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "dynctl.mocker",
        "--port",
        "0",
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    client = Client()
    found = MockerProcess(process, client)
    try:
        if ready:
            await found.ready()
        yield found
    finally:
        await client.close()
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask it to end, so that what it measured of itself is written; then make it end."""
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.communicate(), 5.0)
    except TimeoutError:
        process.kill()
        await process.communicate()
