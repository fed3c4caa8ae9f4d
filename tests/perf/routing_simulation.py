"""How well requests are placed, simulated (`dynctl.simulator`).

    python -m tests.perf.routing_simulation [--trace FILE] [--requests N] [--modes kv,least_loaded]
        [--set overlap_decay=1 --set guard.enabled=false]

A cell of `routing_quality` in seconds, and the same every time: eight engines with the default profile, KV
events taken over at once, load reports once a second. Capacity is what mode kv answers per second in a closed
loop, 16 in flight per worker; loads are open loops at parts of it with the trace's own gaps scaled.

"of oracle" is beside a router whose prompts are cached as soon as they are placed and take no memory while
they run; mode oracle is beside the engines as they are, and always goes to the longest match.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.perfmodel.simulation import Group, Service
from dynctl.perfmodel.trace import BLOCK_TOKENS, TraceRequest, load_trace
from dynctl.protocol.specs import QueueSpec, RouterSpec
from dynctl.simulator.cluster import Cluster, Options
from tests.perf.traces import made_up, oracle_hits

WORKERS = 8
LOADS = (0.5, 1.0, 1.3)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines: KV blocks of so many tokens each."""

    blocks: int
    size: int

    def run(
        self, spec: RouterSpec, requests: list[TraceRequest], seed: int = 1, in_flight: int = 0
    ) -> Cluster:
        """One run; `in_flight`: a closed loop of so many. Nobody waits before the workers."""
        limits = Limits(kv_tokens=self.blocks * self.size, sequences=256, batched_tokens=8192)
        group = Group(role="aggregated", replicas=WORKERS, gpus=1, profile=DEFAULT, limits=limits)
        at_once = msgspec.structs.replace(spec, queue=QueueSpec(limit=0))
        service = Service(name="routing", groups=(group,), router=at_once)
        run = Cluster(service, requests, None, Options(seed=seed, block=self.size, in_flight=in_flight))
        run.run()
        return run


def hot(count: int, seed: int = 1) -> list[TraceRequest]:
    """Nearly all prompts begin with the same 8,192 tokens and go on for a block of their own."""
    rng, fresh = Random(seed), itertools.count(1000)
    found, at_s = [], 0.0
    for _ in range(count):
        at_s += rng.expovariate(10.0)
        start = range(16) if rng.random() < 0.9 else [next(fresh) for _ in range(16)]
        tokens = 16 * BLOCK_TOKENS + rng.randrange(1, BLOCK_TOKENS)
        found.append(TraceRequest(at_s, tokens, rng.randrange(20, 200), (*start, next(fresh))))
    return found


def chatty(count: int, seed: int = 1) -> list[TraceRequest]:
    """Short prompts behind one system prompt of 512 tokens, long answers: decoding is all the work."""
    rng, fresh = Random(seed), itertools.count(1000)
    found, at_s = [], 0.0
    for _ in range(count):
        at_s += rng.expovariate(10.0)
        tokens = BLOCK_TOKENS + rng.randrange(1, BLOCK_TOKENS)
        found.append(TraceRequest(at_s, tokens, rng.randrange(100, 800), (1, next(fresh))))
    return found


SHAPES = {"made_up": made_up, "hot": hot, "chatty": chatty}


def spec_of(mode: str, settings: list[str]) -> RouterSpec:
    """The router's spec in `mode`, changed by NAME=VALUE (GROUP.NAME=VALUE).

    "oracle" goes to the longest match there is at that moment, whatever the load.
    """
    if mode == "oracle":
        mode, settings = "kv", ["overlap_credit=1e6", "guard.enabled=false"]
    given: dict[str, Any] = msgspec.to_builtins(RouterSpec(mode=mode, events="exact"))
    for setting in settings:
        name, _, text = setting.partition("=")
        *groups, last = name.split(".")
        place = given
        for group in groups:
            place = place[group]
        assert last in place, f"no such setting: {name}"
        place[last] = text if isinstance(place[last], str) else msgspec.json.decode(text)
    return msgspec.convert(given, RouterSpec)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trace", type=Path, help="Mooncake trace (JSON lines)")
    parser.add_argument("--shape", choices=SHAPES, default="made_up", help="without a trace: of one made up")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--modes", default="kv,least_loaded,round_robin")
    parser.add_argument("--loads", default=",".join(map(str, LOADS)))
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=6000, help="per worker")
    parser.add_argument("--capacity", type=float, default=0.0, help="requests/s; 0: measure it")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    given = parser.parse_args()
    requests = (
        load_trace(given.trace)[: given.requests] if given.trace else SHAPES[given.shape](given.requests)
    )
    fleet = Fleet(given.blocks, given.block)
    oracle = oracle_hits(requests, WORKERS, given.blocks, given.block)
    capacity = given.capacity
    if not capacity:
        closed = fleet.run(spec_of("kv", given.settings), requests, in_flight=16 * WORKERS)
        capacity = len(requests) / closed.clock.now_s
    natural = len(requests) / max(1e-9, requests[-1].at_s)
    print(f"{len(requests)} requests, oracle {oracle:.1%}, capacity {capacity:.1f} requests/s")
    print(" load mode              p50 ms    p90 ms    p99 ms    hits of oracle  spread")
    for load in map(float, given.loads.split(",")):
        scale = natural / (load * capacity)
        timed = [msgspec.structs.replace(one, at_s=one.at_s * scale) for one in requests]
        for mode in given.modes.split(","):
            for seed in range(given.seeds):
                print(_line(load, mode, fleet.run(spec_of(mode, given.settings), timed, seed), oracle))


def _line(load: float, mode: str, run: Cluster, oracle: float) -> str:
    queries = [one.engine.scheduler.counters.prefix_queries for one in run.fleet.living]
    spread = max(queries) / statistics.mean(queries)
    ttft = sorted(one.ttft_s or 0.0 for one in run.answers)
    p50, p90, p99 = (ttft[int(len(ttft) * share)] * 1e3 for share in (0.5, 0.9, 0.99))
    hits = sum(one.cached for one in run.answers) / sum(queries)
    times = f"{p50:>9.0f} {p90:>9.0f} {p99:>9.0f}"
    return f"{load:>5.2f} {mode:<15} {times} {hits:>7.1%} {hits / oracle:>9.1%} {spread:>7.2f}"


if __name__ == "__main__":
    main()
