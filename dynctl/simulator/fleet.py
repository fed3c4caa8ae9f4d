"""The replicas of all roles: started, booted, drained, ended; who is paid for when, and what routers hear.

A replica that is to go while it boots ends at once. One that serves is drained: it leaves routing, and ends
when its last request has. The newest go first. Where engines may change their role, one that leaves as others
of the other role come goes on as one of these, with what it has cached.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynctl.mocker.blocks import BlocksStored
from dynctl.mocker.scheduler import Limits
from dynctl.perfmodel.simulation import Group, Presence, Service
from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.registry import Member
from dynctl.router.service import Router
from dynctl.simulator.clock import Clock
from dynctl.simulator.engine import Engine, Listener, Model
from dynctl.simulator.pace import Pace

State = Literal["booting", "waiting", "ready", "draining", "ended"]
"""`waiting`: for the engine of one of the other role."""
_RANK = {"booting": 0, "waiting": 0, "ready": 1}
_OTHER: Mapping[Role, Role] = {"prefill": "decode", "decode": "prefill"}


@dataclass(slots=True, eq=False)
class Replica:
    """One replica. `started_s` and `ended_s` (None = it is there) bound what is paid for; it has no start
    while it waits. `taker`: who goes on with its engine.
    """

    group: Group
    number: int
    instance: Instance
    engine: Engine
    started_s: float
    state: State = "booting"
    ended_s: float | None = None
    taker: Replica | None = None

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
        self._handover_s = service.handover_s
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
        """Have so many replicas of these roles, within their bounds: start some, end and drain some, and have
        some change their role.
        """
        come: dict[Role, int] = {}
        leave: list[Replica] = []
        for role, count in wanted.items():
            group = self._groups[role]
            there = self.of(role, "booting", "waiting", "ready")
            come[role] = max(group.least, min(group.most, count)) - len(there)
            newest = sorted(there, key=lambda one: (_RANK[one.state], -one.number))
            leave += newest[: max(0, -come[role])]
        for one in leave:
            other = _OTHER.get(one.group.role, one.group.role)
            if self._handover_s is not None and one.state == "ready" and come.get(other, 0) > 0:
                come[other] -= 1
                one.taker = self._start(other, one.engine)
            self._drain(one)
        for role, count in come.items():
            for _ in range(count):
                self._boot(self._start(role))

    def rested(self, name: str) -> None:
        """An engine has nothing to do: a drained replica may end."""
        one = self.replicas[name]
        if one.state == "draining" and one.engine.empty:
            self._part(one)

    @property
    def engines(self) -> list[Engine]:
        """All there are and were, whatever roles they had."""
        return list({id(one.engine): one.engine for one in self.replicas.values()}.values())

    def gpu_s(self, until_s: float) -> float:
        """GPU-seconds of all replicas, each from its start to its end."""
        return sum(one.gpu_s(until_s) for one in self.replicas.values())

    def _start(self, role: Role, engine: Engine | None = None) -> Replica:
        """A new one, which waits for `engine` where that is given."""
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
        if engine is None:
            own = Engine(name, self._models[role], self._clock, self._listener)
            one = Replica(self._groups[role], number, instance, own, now_s)
        else:
            one = Replica(self._groups[role], number, instance, engine, math.inf, "waiting")
        self.replicas[name] = one
        self.living.append(one)
        return one

    def _boot(self, one: Replica) -> None:
        self._note()
        self._clock.at(self._clock.now_s + self._boot_s, lambda: self._ready(one))

    def _ready(self, one: Replica) -> None:
        if one.state not in ("booting", "waiting"):
            return
        one.state = "ready"
        self._router.members_changed([Member(instance=one.instance, state="ready")], [])
        self._router.on_load(one.report())
        self._note()

    def _drain(self, one: Replica) -> None:
        if one.state != "ready" or (one.engine.empty and one.taker is None):
            self._end(one)
            return
        one.state = "draining"
        self._router.members_changed([Member(instance=one.instance, state="draining")], [])
        self._note()
        if one.engine.empty:
            self._part(one)

    def _part(self, one: Replica) -> None:
        """Its last request has ended."""
        if one.taker is None:
            self._end(one)
        else:
            assert self._handover_s is not None
            self._clock.at(self._clock.now_s + self._handover_s, lambda: self._hand_over(one))

    def _hand_over(self, one: Replica) -> None:
        taker = one.taker
        assert taker is not None
        self._end(one)
        if taker.state == "waiting":  # else it is not wanted any more
            taker.engine.turn(taker.id, self._models[taker.group.role].pace)
            taker.started_s = self._clock.now_s
            self._ready(taker)
            self._listener.cached(taker.id, [BlocksStored(sorted(taker.engine.pool.cached()), None, [])])

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
