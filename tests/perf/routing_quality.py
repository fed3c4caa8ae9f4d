"""How well requests are placed: a trace replayed against 8 mockers, by router mode and load. Prints a table.

    python -m tests.perf.routing_quality [--trace FILE] [--requests N] [--modes kv,oracle,least_loaded]

Every cell is a fresh deployment (`dynctl up`, real processes, empty caches). Capacity is what mode kv answers
per second in a closed loop over the same requests; loads are open loops at 0.5, 1 and 1.3 of it, with the
trace's own gaps scaled. Hit rate is by the engines' counters. Mode oracle always takes the longest match that
the caches have just then; "of ideal" is the share of `traces.oracle_hits`, whose prompts are cached at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynctl.errors import DynctlError
from dynctl.http import runtime
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.perfmodel.trace import TraceRequest, load_trace
from tests.deployment import Cli, Deployment, counter, end_all, get, up
from tests.perf.traces import made_up, oracle_hits, prompt_of

WORKERS = 8
BLOCK = 64
VOCABULARY = 2048
DEADLINE_S = 300.0
LOADS = (0.5, 1.0, 1.3)


@dataclass(slots=True)
class Seen:
    """What the client saw of one run. Seconds; TTFTs in the order of the requests."""

    ttft_s: list[float] = field(default_factory=list)
    failed: int = 0
    lag_s: float = 0.0
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: its mode, load, TTFT percentiles, hit rate by the engines, requests by worker."""

    mode: str
    load: float
    p50_s: float
    p99_s: float
    hit_rate: float
    spread: float
    failed: int
    lag_s: float


class _First:
    """Notes when the first bytes of an answer came."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def feed(self, data: bytes) -> None:
        if not self.at_s:
            self.at_s = time.perf_counter()


ORACLE = {"overlap_credit": 1e6, "guard": {"enabled": False}}
"""Router fields that make mode kv take the longest match there is, whatever the load."""


def recipe(mode: str, speed: float, blocks: int, router: dict[str, Any]) -> dict[str, Any]:
    """Eight mockers behind one frontend; `router` goes to mode kv alone. Mode oracle is kv with `ORACLE`."""
    fields = {"kv": {"mode": "kv", **router}, "oracle": {"mode": "kv", **ORACLE}}
    return {
        "schema": "dynctl/v1",
        "name": "routing-quality",
        "model": {"path": "builtin:tiny", "served_name": "tiny"},
        "backend": "mocker",
        "engine": {
            "args": {
                "max-model-len": 200_000,
                "block-size": BLOCK,
                "num-gpu-blocks-override": blocks,
                "speedup": speed,
            }
        },
        "roles": {"aggregated": {"replicas": WORKERS}},
        "router": fields.get(mode, {"mode": mode}),
        "frontend": {"port": 0},
    }


class Load:
    """Sends requests whose bodies were made beforehand."""

    def __init__(self, url: str, bodies: list[bytes]) -> None:
        self._client = Client(max_idle=1024)
        self._origin = Origin.parse(url)
        self._bodies = bodies

    async def one(self, number: int, seen: Seen) -> None:
        """One request to its end."""
        begun, first = time.perf_counter(), _First()
        timeouts = Timeouts(connect_s=DEADLINE_S, first_byte_s=DEADLINE_S, stall_s=DEADLINE_S)
        try:
            stream = await self._client.open(
                self._origin, "POST", "/v1/completions", body=self._bodies[number], timeouts=timeouts
            )
            await stream.relay(first)
        except DynctlError:
            seen.failed += 1
            return
        if stream.status != 200:
            seen.failed += 1
            return
        seen.ttft_s.append(first.at_s - begun)

    async def open_loop(self, times_s: list[float]) -> Seen:
        """Each request at its time, whatever becomes of the others."""
        seen, begun = Seen(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, at_s in enumerate(times_s):
                await asyncio.sleep(max(0.0, begun + at_s - time.perf_counter()))
                seen.lag_s = max(seen.lag_s, time.perf_counter() - begun - at_s)
                group.create_task(self.one(number, seen))
        seen.took_s = time.perf_counter() - begun
        await self._client.close()
        return seen

    async def closed_loop(self, in_flight: int) -> Seen:
        """All requests in order, so many at a time."""
        seen, begun = Seen(), time.perf_counter()
        numbers = iter(range(len(self._bodies)))

        async def client() -> None:
            for number in numbers:
                await self.one(number, seen)

        await asyncio.gather(*(client() for _ in range(in_flight)))
        seen.took_s = time.perf_counter() - begun
        await self._client.close()
        return seen


def bodies_of(requests: list[TraceRequest]) -> list[bytes]:
    """The HTTP bodies, made before any clock runs."""
    return [
        json.dumps(
            {
                "model": "tiny",
                "prompt": prompt_of(one, VOCABULARY),
                "max_tokens": one.output_tokens,
                "ignore_eos": True,
                "stream": True,
            },
            separators=(",", ":"),
        ).encode()
        for one in requests
    ]


def hits_and_spread(deployment: Deployment) -> tuple[float, float]:
    """Hit rate by the engines' counters; the busiest worker's prompt tokens over the mean."""
    pages = [get(row["url"] + "/metrics") for row in deployment.workers("aggregated")]
    queries = [counter(page, "vllm:prefix_cache_queries_total") for page in pages]
    hits = [counter(page, "vllm:prefix_cache_hits_total") for page in pages]
    return sum(hits) / max(1.0, sum(queries)), max(queries) / max(1.0, statistics.mean(queries))


class Bench:
    """Runs cells one after another, each in a deployment of its own."""

    def __init__(
        self, cli: Cli, requests: list[TraceRequest], speed: float, blocks: int, router: dict[str, Any]
    ) -> None:
        self._cli = cli
        self._router = router
        self._requests = requests
        self._bodies = bodies_of(requests)
        self._speed, self._blocks = speed, blocks

    def capacity(self) -> float:
        """Requests a second in mode kv, 16 in flight per worker."""
        with self._up("kv") as deployment:
            seen = runtime.run(self._closed(deployment.url))
        return len(self._requests) / seen.took_s

    def cell(self, mode: str, load: float, rate: float) -> Cell:
        """One run at `rate` requests a second."""
        natural = len(self._requests) / max(1e-9, self._requests[-1].at_s - self._requests[0].at_s)
        times = [(one.at_s - self._requests[0].at_s) * natural / rate for one in self._requests]
        with self._up(mode) as deployment:
            seen = runtime.run(self._open(deployment.url, times))
            hit_rate, spread = hits_and_spread(deployment)
        ordered = sorted(seen.ttft_s) or [float("nan")]
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        p50 = statistics.median(ordered)
        return Cell(mode, load, p50, p99, hit_rate, spread, seen.failed, seen.lag_s)

    async def _open(self, url: str, times: list[float]) -> Seen:
        return await Load(url, self._bodies).open_loop(times)

    async def _closed(self, url: str) -> Seen:
        return await Load(url, self._bodies).closed_loop(16 * WORKERS)

    def _up(self, mode: str) -> Any:
        file = self._cli.home / f"{mode}.yaml"
        file.write_text(json.dumps(recipe(mode, self._speed, self._blocks, self._router)))
        return up(self._cli, file)


def show(cell: Cell, oracle: float) -> str:
    """One line of the table."""
    return (
        f"{cell.load:>5.2f} {cell.mode:<14} {cell.p50_s * 1e3:>9.0f} {cell.p99_s * 1e3:>9.0f} "
        f"{cell.hit_rate:>7.1%} {cell.hit_rate / oracle:>9.1%} {cell.spread:>7.2f} "
        f"{cell.failed:>6} {cell.lag_s * 1e3:>7.0f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake trace (JSON lines); default: one made up")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--modes", default="kv,oracle,least_loaded,round_robin")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--speed", type=float, default=0.5, help="of the mockers; lower: fewer requests/s")
    parser.add_argument("--blocks", type=int, default=24000, help=f"of {BLOCK} tokens, per worker")
    parser.add_argument("--router", default="{}", help="JSON: further router fields of mode kv")
    parser.add_argument("--skip", type=int, default=0, help="requests of the trace to leave out before")
    parser.add_argument("--capacity", type=float, default=0.0, help="requests/s; 0: measure it")
    given = parser.parse_args()
    count = given.skip + given.requests
    requests = (load_trace(given.trace)[:count] if given.trace else made_up(count))[given.skip :]
    oracle = oracle_hits(requests, WORKERS, given.blocks, BLOCK)
    mean = statistics.mean(one.prompt_tokens for one in requests)
    print(f"{len(requests)} requests, mean prompt {mean:.0f} tokens, the ideal's hit rate {oracle:.1%}")
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Cli(Path(home)), requests, given.speed, given.blocks, json.loads(given.router))
        try:
            capacity = given.capacity or bench.capacity()
            print(f"capacity {capacity:.1f} requests/s")
            print(" load mode             p50 ms    p99 ms    hits  of ideal  spread failed  lag ms")
            for load in map(float, given.loads.split(",")):
                for mode in given.modes.split(","):
                    print(show(bench.cell(mode, load, load * capacity), oracle), flush=True)
        finally:
            end_all(Path(home))


if __name__ == "__main__":
    main()
