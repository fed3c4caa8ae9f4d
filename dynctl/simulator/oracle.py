"""Replicas for a demand that is known: what a planner could do at best, and fixed numbers to set beside it.

A request's *work* is the time it takes of a replica: prefill, what of its prompt is not cached; decode, its
tokens at the largest batch within the SLA. Interval i takes n_i = ceil(work that arrives in it / (u * T)),
and as many are started one boot earlier. The oracle is the schedule with the largest u, by role, that keeps
the SLA when it is simulated: the least GPU-hours of all schedules of that kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynctl.perfmodel.simulation import Group, Result, Service
from dynctl.perfmodel.trace import TraceRequest
from dynctl.protocol.instances import Role
from dynctl.simulator.desk import Answer
from dynctl.simulator.pilots import Schedule, largest_batch

INTERVAL_S = 30.0
_LADDER = tuple(0.2 * 1.12**step for step in range(22))
"""Utilisations that are tried: 0.2 to 2.2. Above 1 the peak of one interval is worked off in the next."""

Measure = Callable[[Schedule], Result]


@dataclass(frozen=True, slots=True)
class Work:
    """Seconds of a replica that arrive in each interval, by role."""

    groups: tuple[Group, ...]
    boot_s: float
    rows: tuple[Mapping[Role, float], ...]

    def replicas(self, busy: Mapping[Role, float]) -> list[dict[Role, int]]:
        """Replicas that each interval takes when they are so busy."""
        return [
            {one.role: self._bounded(one, row[one.role] / INTERVAL_S / busy[one.role]) for one in self.groups}
            for row in self.rows
        ]

    def schedule(self, busy: Mapping[Role, float]) -> Schedule:
        """The same, started a boot ahead; nothing is taken away that is wanted again within a boot."""
        needed, ahead = self.replicas(busy), math.ceil(self.boot_s / INTERVAL_S)
        return Schedule(
            INTERVAL_S,
            [
                {one.role: max(row[one.role] for row in needed[i : i + ahead + 1]) for one in self.groups}
                for i in range(len(needed))
            ],
        )

    def peak(self, busy: Mapping[Role, float]) -> dict[Role, int]:
        """Replicas for the interval that takes most."""
        needed = self.replicas(busy)
        return {one.role: max(row[one.role] for row in needed) for one in self.groups}

    def mean(self, busy: Mapping[Role, float]) -> dict[Role, int]:
        """Replicas for demand as it is on average."""
        span_s = INTERVAL_S * len(self.rows)
        return {
            one.role: self._bounded(one, sum(row[one.role] for row in self.rows) / span_s / busy[one.role])
            for one in self.groups
        }

    def _bounded(self, group: Group, replicas: float) -> int:
        return max(group.least, min(group.most, math.ceil(replicas - 1e-9)))


def work_of(service: Service, requests: Sequence[TraceRequest], answers: Sequence[Answer]) -> Work:
    """The work of a trace. `answers` are those of a run, for what was cached."""
    intervals = int(requests[-1].at_s / INTERVAL_S) + 1
    rows: list[dict[Role, float]] = [{one.role: 0.0 for one in service.groups} for _ in range(intervals)]
    for request, answer in zip(requests, answers, strict=True):
        row = rows[int(request.at_s / INTERVAL_S)]
        for group in service.groups:
            row[group.role] += _seconds(group, request, answer.cached, service.sla.itl_s)
    return Work(service.groups, service.boot_s, tuple(rows))


def _seconds(group: Group, request: TraceRequest, cached: int, itl_s: float | None) -> float:
    seconds = 0.0
    if group.role != "decode":
        seconds += group.profile.prefill_s(cached, request.prompt_tokens - cached)
    if group.role != "prefill":
        context = request.prompt_tokens + request.output_tokens / 2
        batch = largest_batch(group, context, itl_s)
        seconds += request.output_tokens * group.profile.decode_s(batch, context) / batch
    return seconds


def best(service: Service, work: Work, measure: Measure) -> tuple[dict[Role, float], Result] | None:
    """How busy the replicas of the oracle are, and its run; None when no schedule keeps the SLA."""
    steps = dict.fromkeys((one.role for one in service.groups), 0)
    tried: dict[tuple[int, ...], Result] = {}

    def keeps(at: Mapping[Role, int]) -> bool:
        key = tuple(at.values())
        if key not in tried:
            tried[key] = measure(work.schedule({role: _LADDER[step] for role, step in at.items()}))
        return tried[key].keeps(service.sla)

    if not keeps(steps):
        return None
    low, high = 0, len(_LADDER)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(dict.fromkeys(steps, middle)) else (low, middle)
    steps = dict.fromkeys(steps, low)
    for role in steps if len(steps) > 1 else ():
        while steps[role] + 1 < len(_LADDER) and keeps(steps | {role: steps[role] + 1}):
            steps[role] += 1
    busy = {role: _LADDER[step] for role, step in steps.items()}
    return busy, tried[tuple(steps.values())]
