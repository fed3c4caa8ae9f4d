"""How well requests are placed, simulated: the router and the mocker's schedulers on a clock of their own.

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
import heapq
import itertools
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from dynctl.mocker.blocks import BlockPool, BlocksStored
from dynctl.mocker.leases import PinBoard
from dynctl.mocker.scheduler import Limits, Scheduler, Sequence, Step
from dynctl.perfmodel.profile import DEFAULT, Profile
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KvSync, KvSyncReply, LoadReport, Removed, Stored
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Ticket
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router, WorkerLinks
from tests.perf.traces import BLOCK_TOKENS, TraceRequest, made_up, oracle_hits, read_trace
from tests.workers import worker_instance

WORKERS = 8
REPORT_S = 1.0
LOADS = (0.5, 1.0, 1.3)


@dataclass(frozen=True, slots=True)
class Fleet:
    """The engines: KV blocks of so many tokens each, and how fast they are."""

    blocks: int
    size: int
    profile: Profile = DEFAULT
    max_seqs: int = 256
    batched_tokens: int = 8192


@dataclass(slots=True)
class Outcome:
    """Seconds to the first token in the order of arrival; tokens found cached and asked for, by worker."""

    ttft_s: list[float] = field(default_factory=list)
    hits: int = 0
    queries: list[int] = field(default_factory=list)
    took_s: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of all prompt tokens."""
        return self.hits / max(1, sum(self.queries))

    def quantile(self, share: float) -> float:
        """Of the times to first token."""
        return sorted(self.ttft_s)[min(len(self.ttft_s) - 1, int(len(self.ttft_s) * share))]


class _Source:
    """A model that says the same token all the time."""

    def next(self, eos_allowed: bool) -> int:
        return 1


@dataclass(slots=True)
class _Running:
    """What a sequence belongs to."""

    arrived_s: float
    ticket: Ticket
    first: bool = False


class _Engine:
    """One worker's scheduler; `step` is what it computes now."""

    def __init__(self, fleet: Fleet) -> None:
        self.pool = BlockPool(fleet.blocks, fleet.size)
        limits = Limits(fleet.max_seqs, fleet.batched_tokens)
        self.scheduler = Scheduler(limits, self.pool, PinBoard(30.0))
        self.step: Step | None = None


class Simulation:
    """One run: one router, its workers, one clock."""

    def __init__(self, spec: RouterSpec, fleet: Fleet, requests: list[TraceRequest], seed: int = 1) -> None:
        self._fleet = fleet
        self._requests = requests
        self._now = 0.0
        self._engines = [_Engine(fleet) for _ in range(WORKERS)]
        self._router = Router(
            spec, WorkerLinks(_no_sync, _ignore, _ignore), rng=Random(seed), clock=lambda: self._now
        )
        self._router.members_changed([_member(number, fleet.size) for number in range(WORKERS)], [])
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._left = len(requests)
        self._closed: list[int] = []
        self.outcome = Outcome()

    def open_loop(self, times_s: list[float]) -> Outcome:
        """Each request at its time."""
        for number, at_s in enumerate(times_s):
            self._at(at_s, lambda number=number: self._arrive(number))  # type: ignore[misc]
        return self._run()

    def closed_loop(self, in_flight: int) -> Outcome:
        """So many at a time, in order."""
        self._closed = list(range(len(self._requests)))[::-1]
        for _ in range(min(in_flight, len(self._closed))):
            self._arrive(self._closed.pop())
        return self._run()

    def _run(self) -> Outcome:
        self._at(REPORT_S, self._report)
        while self._left:
            self._now, _, act = heapq.heappop(self._queue)
            act()
        self.outcome.took_s = self._now
        for engine in self._engines:
            self.outcome.hits += engine.scheduler.counters.prefix_hits
            self.outcome.queries.append(engine.scheduler.counters.prefix_queries)
        return self.outcome

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), act))

    def _arrive(self, number: int) -> None:
        one = self._requests[number]
        hashes = hashes_of(one, self._fleet.size)
        choice = self._router.choose(RouteRequest("aggregated", hashes, one.prompt_tokens))
        seq = Sequence(
            id=str(number),
            tokens=[0] * one.prompt_tokens,
            max_tokens=one.output_tokens,
            source=_Source(),
            owner=_Running(self._now, choice.ticket),
            hashes=list(hashes),  # type: ignore[arg-type]
        )
        where = choice.instance.index
        self._engines[where].scheduler.add(seq, self._now)
        if self._engines[where].step is None:
            self._begin(where)

    def _begin(self, where: int) -> None:
        engine, profile = self._engines[where], self._fleet.profile
        engine.step = step = engine.scheduler.begin(self._now)
        self._tell(where)
        if step is None:
            return
        work_s = sum(profile.prefill_s(start, count) for start, count in step.prefills)
        context = step.context / step.batch if step.batch else 0.0
        self._at(self._now + profile.step_s(work_s, step.batch, context), lambda: self._end(where))

    def _end(self, where: int) -> None:
        engine = self._engines[where]
        assert engine.step is not None
        for seq, _, reason in engine.scheduler.commit(engine.step, self._now):
            running = seq.owner
            if not running.first:
                running.first = True
                running.ticket.first_token()
                self.outcome.ttft_s.append(self._now - running.arrived_s)
            if reason:
                running.ticket.finish()
                self._left -= 1
                if self._closed:
                    self._arrive(self._closed.pop())
        self._begin(where)

    def _tell(self, where: int) -> None:
        """The engine's KV events, taken over at once."""
        for event in self._engines[where].pool.take_events():
            kind = Stored if isinstance(event, BlocksStored) else Removed
            hashes: Any = getattr(event, "hashes", [])
            self._router._index.apply((f"aggregated-{where}", 0), kind(hashes))

    def _report(self) -> None:
        for where, engine in enumerate(self._engines):
            scheduler, pool = engine.scheduler, engine.pool
            load = LoadReport(
                f"aggregated-{where}",
                1,
                0,
                len(scheduler.running),
                len(scheduler.waiting),
                pool.usage,
                kv_blocks=pool.count,
            )
            self._router.on_load(load)
        self._at(self._now + REPORT_S, self._report)


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


def hashes_of(request: TraceRequest, size: int) -> list[int]:
    """Sequence hashes of a trace's prompt in blocks of `size` tokens, which divides the trace's own."""
    parts = BLOCK_TOKENS // size
    hashes = [block * parts + part for block in request.blocks for part in range(parts)]
    return hashes[: request.prompt_tokens // size]


def _member(number: int, size: int) -> Member:
    instance = worker_instance(number, id=f"aggregated-{number}", model=ModelCard(name="m", block_size=size))
    return Member(instance=instance, state="ready")


def _no_sync(instance: Instance, sync: KvSync) -> Awaitable[KvSyncReply]:
    raise AssertionError("workers without an event plane are not asked")


def _ignore(endpoint: str) -> None:
    return


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
    requests = read_trace(given.trace, given.requests) if given.trace else SHAPES[given.shape](given.requests)
    fleet = Fleet(given.blocks, given.block)
    oracle = oracle_hits(requests, WORKERS, given.blocks, given.block)
    capacity = given.capacity
    if not capacity:
        closed = Simulation(spec_of("kv", given.settings), fleet, requests).closed_loop(16 * WORKERS)
        capacity = len(requests) / closed.took_s
    natural = len(requests) / max(1e-9, requests[-1].at_s)
    print(f"{len(requests)} requests, oracle {oracle:.1%}, capacity {capacity:.1f} requests/s")
    print(" load mode              p50 ms    p90 ms    p99 ms    hits of oracle  spread")
    for load in map(float, given.loads.split(",")):
        times = [one.at_s * natural / (load * capacity) for one in requests]
        for mode in given.modes.split(","):
            for seed in range(given.seeds):
                spec = spec_of(mode, given.settings)
                print(_line(load, mode, Simulation(spec, fleet, requests, seed).open_loop(times), oracle))


def _line(load: float, mode: str, seen: Outcome, oracle: float) -> str:
    spread = max(seen.queries) / statistics.mean(seen.queries)
    p50, p90, p99 = (seen.quantile(share) * 1e3 for share in (0.5, 0.9, 0.99))
    return (
        f"{load:>5.2f} {mode:<15} {p50:>9.0f} {p90:>9.0f} {p99:>9.0f} "
        f"{seen.hit_rate:>7.1%} {seen.hit_rate / oracle:>9.1%} {spread:>7.2f}"
    )


if __name__ == "__main__":
    main()
