"""What it costs frontends to hear of each other: CPU per request with 1, 2 and 4 of them.

    python -m tests.perf.frontends_cpu [--rate 200] [--seconds 8] [--rounds 3]

Simulated engines, the same load on the shared port, alternating rounds; CPU of all frontends together,
and what of it they use when nothing happens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from tests.deployment import RECIPES, Cli, Deployment, end_all, up

NUMBERS = (1, 2, 4)
CONNECTIONS = 16
IDLE_S = 4.0
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(deployment: Deployment) -> float:
    """CPU seconds of all frontends so far."""
    total = 0.0
    for row in deployment.workers("frontend"):
        fields = Path(f"/proc/{row['pid']}/stat").read_text().rpartition(") ")[2].split()
        total += (int(fields[11]) + int(fields[12])) * TICK_S
    return total


async def load(url: str, rate: float, seconds: float) -> int:
    """So many requests a second over connections that stay; how many were answered."""
    parts = urlsplit(url)
    count = int(rate * seconds)
    begins = asyncio.get_running_loop().time()
    todo = iter(range(count))

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        for number in todo:
            await asyncio.sleep(begins + number / rate - asyncio.get_running_loop().time())
            words = f"{number % 50} " + "word " * 64
            body = json.dumps({"model": "tiny", "prompt": words, "max_tokens": 2}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            await reader.readexactly(int(answer.partition(b"content-length:")[2].split(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return count


def one_round(frontends: int, rate: float, seconds: float) -> tuple[float, float]:
    """CPU milliseconds a request, CPU share when idle."""
    with tempfile.TemporaryDirectory() as home:
        sets = ("--set", "frontend.port=0", "--set", f"frontend.replicas={frontends}")
        try:
            with up(Cli(Path(home) / "home"), RECIPES / "quickstart.yaml", *sets) as deployment:
                asyncio.run(load(deployment.url, rate, 2.0))
                before = cpu_s(deployment)
                count = asyncio.run(load(deployment.url, rate, seconds))
                used = cpu_s(deployment) - before
                before = cpu_s(deployment)
                asyncio.run(asyncio.sleep(IDLE_S))
                idle = (cpu_s(deployment) - before) / IDLE_S
        finally:
            end_all(Path(home) / "home")
    return 1000 * used / count, idle


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[int, list[tuple[float, float]]] = {number: [] for number in NUMBERS}
    for _ in range(given.rounds):
        for number in NUMBERS:
            found[number].append(one_round(number, given.rate, given.seconds))
    for number, rounds in found.items():
        ms, idle = (statistics.median(column) for column in zip(*rounds, strict=True))
        sys.stdout.write(
            f"{number} frontends: {ms:.2f} ms CPU a request at {given.rate:g}/s, "
            f"idle {100 * idle:.1f} % of a core\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
