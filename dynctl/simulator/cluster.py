"""One run: a trace against a service, with the real router, on a clock of its own."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import msgspec

from dynctl.errors import ProfileError
from dynctl.mocker.blocks import BlockEvent, BlocksStored
from dynctl.mocker.scheduler import Output
from dynctl.mocker.scheduler import Sequence as Running
from dynctl.perfmodel.simulation import Service
from dynctl.perfmodel.trace import BLOCK_TOKENS, TraceRequest, hashes
from dynctl.protocol.instances import Instance, Role
from dynctl.protocol.kv_events import KvSync, KvSyncReply, Removed, Stored
from dynctl.router.service import Router, WorkerLinks
from dynctl.simulator.clock import Clock
from dynctl.simulator.desk import Answer, Desk
from dynctl.simulator.door import Door
from dynctl.simulator.fleet import Fleet

_REPORT_S = 1.0
"""Workers tell their load so often."""
_BLOCKS = 16
"""About so many blocks make a prompt: smaller ones cost time and change nothing."""
_SMALLEST_BLOCK = 16


class Pilot(Protocol):
    """Who says how many replicas there are to be."""

    @property
    def interval_s(self) -> float:
        """How often it is asked."""
        ...

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        """Replicas by role from now on; roles that are to stay as they are may be left out."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """How to run. `jumps` False: each step of each engine by itself. `block`: tokens of a KV block, a divisor
    of 512; 0 = as fits the trace. `in_flight`: a closed loop of so many, whatever the times of the requests;
    0 = each comes at its time. `on_progress` hears the share done.
    """

    seed: int = 1
    jumps: bool = True
    block: int = 0
    in_flight: int = 0
    on_progress: Callable[[float], None] | None = None


class Cluster:
    """The run itself. `answers` are by number, in the order of arrival."""

    def __init__(
        self, service: Service, requests: Sequence[TraceRequest], pilot: Pilot | None, options: Options
    ) -> None:
        self.size = size = options.block or block_size(requests)
        check(service, requests, size)
        self.service = service
        self.requests = requests
        self.clock = clock = Clock()
        self.steps = 0
        self._pilot = pilot
        self._options = options
        spec = service.router
        if spec.events == "auto":
            spec = msgspec.structs.replace(spec, events="exact")
        links = WorkerLinks(_no_sync, _ignore, _ignore)
        self.router = Router(
            spec, links, block_size=size, rng=Random(options.seed), clock=lambda: clock.now_s
        )
        self.fleet = Fleet(service, size, clock, self.router, self, jumps=options.jumps)
        self.desk = Desk(
            requests, hashes(requests, size), size, (self.router, self.fleet, clock), self._ended
        )
        roles = [group.role for group in service.groups]
        ways = (self.desk.route, self.desk.refuse)
        self.door = self.desk.door = Door(self.router, roles, (spec.queue, service.busy), clock, ways)
        self.arrived = 0
        self._exact = spec.mode == "kv"
        self._left = len(requests)

    @property
    def answers(self) -> list[Answer]:
        """Of all requests that have come."""
        return [self.desk.answers[number] for number in range(self.arrived)]

    def run(self) -> None:
        """From the first request to the last token."""
        self.begin()
        while self._left and self.clock.step():
            pass
        if self._left:
            raise AssertionError(f"{self._left} requests never ended")

    def begin(self) -> None:
        """Have all that happens by itself be due."""
        clock = self.clock
        clock.at(0.0, self._report)
        if self._pilot is not None:
            clock.at(0.0, self._steer)
        for _ in range(min(self._options.in_flight, len(self.requests))):
            clock.at(0.0, self._arrive)
        if not self._options.in_flight:
            clock.at(self.requests[0].at_s, self._arrive)

    def said(self, engine: str, outputs: list[Output]) -> None:
        """See `engine.Listener`."""
        self.desk.said(engine, outputs)

    def fetch(self, engine: str, seq: Running) -> None:
        """See `engine.Listener`."""
        self.desk.fetch(engine, seq)

    def cached(self, engine: str, events: list[BlockEvent]) -> None:
        """See `engine.Listener`: the router hears at once."""
        if not self._exact:
            return
        for stored, group in itertools.groupby(events, key=lambda one: isinstance(one, BlocksStored)):
            held: list[Any] = [digest for one in group for digest in getattr(one, "hashes", [])]
            self.router.holds(engine, 0, Stored(held) if stored else Removed(held))

    def rested(self, engine: str) -> None:
        """See `engine.Listener`."""
        self.fleet.rested(engine)

    def _arrive(self) -> None:
        number = self.arrived
        self.arrived += 1
        if self.arrived < len(self.requests) and not self._options.in_flight:
            self.clock.at(self.requests[self.arrived].at_s, self._arrive)
        if self._exact:
            for one in self.fleet.living:
                one.engine.show_cache()
        self.desk.arrive(number)

    def _ended(self) -> None:
        self._left -= 1
        if self._options.in_flight and self.arrived < len(self.requests):
            self.clock.at(self.clock.now_s, self._arrive)
        tell, total = self._options.on_progress, len(self.requests)
        over = total - self._left
        if tell is not None and over * 100 // total != (over - 1) * 100 // total:
            tell(over / total)

    def _report(self) -> None:
        for one in self.fleet.living:
            if one.state == "ready":
                self.router.on_load(one.report())
        self.clock.at(self.clock.now_s + _REPORT_S, self._report)

    def _steer(self) -> None:
        assert self._pilot is not None
        self.fleet.scale(self._pilot.wanted(self))
        self.clock.at(self.clock.now_s + self._pilot.interval_s, self._steer)


def block_size(requests: Sequence[TraceRequest]) -> int:
    """Tokens of a KV block that fits the trace: a power of two, a divisor of the trace's own."""
    mean = sum(one.prompt_tokens for one in requests) / len(requests)
    size = _SMALLEST_BLOCK
    while size * 2 * _BLOCKS <= mean and size < BLOCK_TOKENS:
        size *= 2
    return size


def check(service: Service, requests: Sequence[TraceRequest], size: int) -> None:
    """Raises ProfileError for a request that is longer than what a replica's KV cache holds."""
    longest = max(requests, key=lambda one: one.prompt_tokens + one.output_tokens)
    needed = longest.prompt_tokens + longest.output_tokens
    for group in service.groups:
        room = group.limits.kv_tokens // size * size
        if needed > room:
            raise ProfileError(
                f"a request of {longest.prompt_tokens} prompt and {longest.output_tokens} answer tokens does"
                f" not fit into the {room} KV tokens of one replica ({group.role})",
                where=group.profile.name,
                hint="a profile with higher limits, or a trace without it",
            )


def _no_sync(instance: Instance, sync: KvSync) -> Awaitable[KvSyncReply]:
    raise AssertionError("workers without an event plane are not asked")


def _ignore(endpoint: str) -> None:
    return
