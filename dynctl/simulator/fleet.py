"""The replicas of all roles: started, booted, drained, ended; who is paid for when, and what routers hear.

A replica that is to go while it boots ends at once. One that serves is drained: it leaves routing, and ends
when its last request has. The newest go first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynctl.mocker.scheduler import Limits
from dynctl.perfmodel.simulation import Group, Presence, Service
from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.registry import Member
from dynctl.router.service import Router
from dynctl.simulator.clock import Clock
from dynctl.simulator.engine import Engine, Listener, Model
from dynctl.simulator.pace import Pace

State = Literal["booting", "ready", "draining", "ended"]
_RANK = {"booting": 0, "ready": 1}


@dataclass(slots=True, eq=False)
class Replica:
    """One replica. `started_s` and `ended_s` (None = it is there) bound what is paid for."""

    group: Group
    number: int
    instance: Instance
    engine: Engine
    started_s: float
    state: State = "booting"
    ended_s: float | None = None

    @property
    def id(self) -> str:
        """As routers know it."""
        return self.instance.id

    def gpu_s(self, until_s: float) -> float:
        """GPU-seconds from its start to its end, or until then."""
        end_s = until_s if self.ended_s is None else min(self.ended_s, until_s)
        return self.group.gpus * max(0.0, end_s - self.started_s)

    def report(self) -> LoadReport:
        """What its engine says of itself now."""
        self.engine.catch_up()
        scheduler, pool = self.engine.scheduler, self.engine.pool
        waiting = len(scheduler.waiting) + len(scheduler.receiving)
        return LoadReport(self.id, 1, 0, len(scheduler.running), waiting, pool.usage, kv_blocks=pool.count)


class Fleet:
    """All replicas there are and were. `size`: tokens of a KV block."""

    def __init__(
        self, service: Service, size: int, clock: Clock, router: Router, listener: Listener, *, jumps: bool
    ) -> None:
        self.replicas: dict[str, Replica] = {}
        self.living: list[Replica] = []
        self.presence: list[Presence] = []
        self._boot_s = service.boot_s
        self._groups = {group.role: group for group in service.groups}
        self._models = {group.role: _model(group, size, jumps=jumps) for group in service.groups}
        self._numbers = {role: itertools.count() for role in self._groups}
        self._size = size
        self._clock = clock
        self._router = router
        self._listener = listener
        for group in service.groups:
            for _ in range(group.replicas):
                self._ready(self._start(group.role))

    def of(self, role: Role, *states: State) -> list[Replica]:
        """The replicas of a role in one of these states, oldest first."""
        return [one for one in self.living if one.group.role == role and one.state in states]

    def scale(self, wanted: Mapping[Role, int]) -> None:
        """Have so many replicas of these roles, within their bounds: start some, or end and drain some."""
        for role, count in wanted.items():
            group = self._groups[role]
            target = max(group.least, min(group.most, count))
            there = self.of(role, "booting", "ready")
            for _ in range(target - len(there)):
                self._boot(self._start(role))
            leaving = sorted(there, key=lambda one: (_RANK[one.state], -one.number))
            for one in leaving[: max(0, len(there) - target)]:
                self._drain(one)

    def rested(self, name: str) -> None:
        """An engine has nothing to do: a drained replica may end."""
        one = self.replicas[name]
        if one.state == "draining" and one.engine.empty:
            self._end(one)

    def gpu_s(self, until_s: float) -> float:
        """GPU-seconds of all replicas, each from its start to its end."""
        return sum(one.gpu_s(until_s) for one in self.replicas.values())

    def _start(self, role: Role) -> Replica:
        number, now_s = next(self._numbers[role]), self._clock.now_s
        name = f"{role}-{number}"
        instance = Instance(
            id=name,
            incarnation=1,
            role=role,
            index=number,
            node="",
            pid=0,
            started_at=now_s,
            url="",
            model=ModelCard(
                name="m",
                block_size=self._size,
                max_batched_tokens=self._models[role].limits.max_batched_tokens,
            ),
        )
        engine = Engine(name, self._models[role], self._clock, self._listener)
        one = Replica(self._groups[role], number, instance, engine, now_s)
        self.replicas[name] = one
        self.living.append(one)
        return one

    def _boot(self, one: Replica) -> None:
        self._note()
        self._clock.at(self._clock.now_s + self._boot_s, lambda: self._ready(one))

    def _ready(self, one: Replica) -> None:
        if one.state != "booting":
            return
        one.state = "ready"
        self._router.members_changed([Member(instance=one.instance, state="ready")], [])
        self._router.on_load(one.report())
        self._note()

    def _drain(self, one: Replica) -> None:
        if one.state == "booting" or one.engine.empty:
            self._end(one)
            return
        one.state = "draining"
        self._router.members_changed([Member(instance=one.instance, state="draining")], [])
        self._note()

    def _end(self, one: Replica) -> None:
        one.state = "ended"
        one.ended_s = self._clock.now_s
        self.living.remove(one)
        self._router.members_changed([], [one.id])
        self._note()

    def _note(self) -> None:
        """Remember who is there now; of several changes at one moment the last."""
        there = {role: len(self.of(role, "booting", "ready", "draining")) for role in self._groups}
        ready = {role: len(self.of(role, "ready")) for role in self._groups}
        now = Presence(at_s=self._clock.now_s, there=there, ready=ready)
        if self.presence and self.presence[-1].at_s == now.at_s:
            self.presence.pop()
        self.presence.append(now)


def _model(group: Group, size: int, *, jumps: bool) -> Model:
    limits = group.limits
    steps = Limits(limits.sequences, limits.batched_tokens)
    return Model(max(1, limits.kv_tokens // size), size, steps, Pace(group.profile), jumps)
