"""Steady load for a while, and what memory it takes: `python -m tests.perf.soak [--minutes 10] [--rate 20]`.

Four mockers, two frontends on one port, through `dynctl up`. Requests are streams of all sorts, with
shared beginnings and ends of their own, one in twenty cut by its client. Prints the memory of each process
over time, what failed, and what is in flight at the end. The token cache is small, so that it is soon full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

from dynctl.errors import DynctlError
from dynctl.http import runtime
from dynctl.http.client import Client, Origin, Timeouts
from tests.deployment import Cli, Deployment, counter, end_all, get, up

RECIPE = {
    "schema": "dynctl/v1",
    "name": "soak",
    "model": {"path": "builtin:tiny", "served_name": "tiny"},
    "backend": "mocker",
    "engine": {"args": {"num-gpu-blocks-override": 4096, "speedup": 4.0}},
    "roles": {"aggregated": {"replicas": 4}},
    "frontend": {"port": 0, "replicas": 2, "tokenizer_cache": "8MiB"},
}
SAMPLE_S = 10.0
DEADLINE_S = 60.0


class Soak:
    """One run."""

    def __init__(self, deployment: Deployment, rate: float, seconds: float) -> None:
        self._deployment = deployment
        self._rate, self._seconds = rate, seconds
        self._rng = Random(5)
        self.ends: Counter[str] = Counter()
        self.memory: dict[str, list[float]] = defaultdict(list)

    async def run(self) -> None:
        """Requests and samples until the time is over."""
        client, origin = Client(), Origin.parse(self._deployment.url)
        begun = time.monotonic()
        samples = asyncio.create_task(self._sample())
        async with asyncio.TaskGroup() as group:
            while time.monotonic() < begun + self._seconds:
                group.create_task(self._one(client, origin))
                await asyncio.sleep(self._rng.expovariate(self._rate))
        samples.cancel()
        await asyncio.gather(samples, return_exceptions=True)
        await client.close()

    def _body(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        common = {"model": "tiny", "stream": True, "max_tokens": rng.randrange(16, 128)}
        words = " ".join(f"w{rng.randrange(10**6)}" for _ in range(rng.randrange(10, 200)))
        begin = "You are a helper of team " + str(rng.randrange(12)) + ". Be brief and kind. " * 40
        if rng.random() < 0.5:
            return "/v1/completions", {**common, "prompt": begin + words}
        return "/v1/chat/completions", {
            **common,
            "messages": [{"role": "system", "content": begin}, {"role": "user", "content": words}],
        }

    async def _one(self, client: Client, origin: Origin) -> None:
        path, body = self._body()
        leaves = self._rng.random() < 0.05
        timeouts = Timeouts(connect_s=DEADLINE_S, first_byte_s=DEADLINE_S, stall_s=DEADLINE_S)
        try:
            stream = await client.open(
                origin, "POST", path, body=json.dumps(body).encode(), timeouts=timeouts
            )
            if leaves:
                stream.abort()
                self.ends["left"] += 1
                return
            told = await stream.read(1 << 24)
        except DynctlError as error:
            self.ends[error.kind] += 1
            return
        whole = stream.status == 200 and told.rstrip().endswith(b"[DONE]")
        self.ends["whole" if whole else f"status {stream.status}"] += 1

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_S)
            for row in await asyncio.to_thread(self._deployment.ps):
                for pid in (row["pid"], row.get("engine_pid")):
                    if pid:
                        kind = row["role"] if pid == row["pid"] else "engine"
                        self.memory[f"{kind} {row['index']} {pid}"].append(resident_mib(int(pid)))


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def main() -> None:
    """Print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=20.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        cli = Cli(Path(home))
        file = Path(home) / "soak.yaml"
        file.write_text(json.dumps(RECIPE))
        try:
            with up(cli, file) as deployment:
                soak = Soak(deployment, given.rate, given.minutes * 60)
                runtime.run(soak.run())
                time.sleep(2)
                urls = [row["url"] for row in deployment.workers("frontend")]
                inflight = sum(
                    counter(get(u + "/metrics"), "dynctl_frontend_inflight_requests") for u in urls
                )
        finally:
            end_all(Path(home))
    print(f"{sum(soak.ends.values())} requests: {dict(soak.ends)}; in flight at the end: {inflight:g}")
    print("resident MiB: mean of each fifth of the time")
    for name, values in sorted(soak.memory.items()):
        fifth = max(1, len(values) // 5)
        means = [statistics.mean(values[i : i + fifth]) for i in range(0, fifth * 5, fifth) if values[i:]]
        print(f"  {name:<22}" + "".join(f"{mean:>8.1f}" for mean in means))


if __name__ == "__main__":
    main()
