"""How many output tokens a second one mocker simulates over real HTTP: `python tests/perf/mocker_speed.py`.

Starts a mocker with no simulated time, streams 64 chat answers at once from this process, and prints tokens a
second by the wall clock and by the mocker's own processor time (what one core does when client and mocker do
not share it).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
import urllib.request
from typing import cast

import uvloop

MARK = b'"content":" '
DEADLINE_S = 120


class Stream(asyncio.Protocol):
    """One streamed request after another on one connection; counts tokens as they come."""

    def __init__(self, request: bytes, repeats: int) -> None:
        self.request = request
        self.left = repeats
        self.tokens = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.tokens += data.count(MARK)
        if data.endswith(b"0\r\n\r\n"):
            self.left -= 1
            if self.left:
                self.transport.write(self.request)
            else:
                self.done.set_result(None)
                self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("closed by the mocker"))


async def load(port: int, streams: int, tokens: int, repeats: int) -> int:
    """Tokens received in all."""
    loop = asyncio.get_running_loop()
    protocols: list[Stream] = []
    for number in range(streams):
        body = json.dumps(
            {
                "messages": [{"role": "user", "content": f"tell story number {number}"}],
                "max_tokens": tokens,
                "stream": True,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
        )
        _, protocol = await loop.create_connection(
            lambda request=head + body: Stream(request, repeats),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        protocols.append(protocol)
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*(protocol.done for protocol in protocols))
    return sum(protocol.tokens for protocol in protocols)


def cpu_s(pid: int) -> float:
    """Processor seconds a process has used."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_ready(url: str, deadline_s: float) -> None:
    """Return when `url` answers; RuntimeError after the deadline."""
    until = time.monotonic() + deadline_s
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer in {deadline_s} s")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--port", type=int, default=18321)
    parser.add_argument("--events", action="store_true", help="with KV events on")
    options = parser.parse_args()
    events = {"enable_kv_cache_events": True, "endpoint": "tcp://127.0.0.1:0"}
    command = [sys.executable, "-m", "dynctl.mocker", "--port", str(options.port), "--speedup", "0"]
    command += ["--num-gpu-blocks-override", "16384"]
    command += ["--kv-events-config", json.dumps(events)] if options.events else []
    started = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_ready(f"http://127.0.0.1:{options.port}/health", 30)
        ready_s = time.monotonic() - started
        uvloop.run(load(options.port, options.streams, 50, 1))
        cpu, began = cpu_s(process.pid), time.monotonic()
        total = uvloop.run(load(options.port, options.streams, options.tokens, options.repeats))
        wall, used = time.monotonic() - began, cpu_s(process.pid) - cpu
    finally:
        process.terminate()
        process.wait(10)
    print(
        f"{'streams':>8} {'tokens':>9} {'start s':>8} {'wall s':>8} {'cpu s':>8} "
        f"{'tok/s':>9} {'tok/cpu-s':>10}"
    )
    print(
        f"{options.streams:>8} {total:>9} {ready_s:>8.2f} {wall:>8.2f} {used:>8.2f} "
        f"{total / wall:>9.0f} {total / used:>10.0f}"
    )


if __name__ == "__main__":
    main()
