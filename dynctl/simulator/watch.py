"""What a planner is told of a run: the same observation as of a real deployment."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev

from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role
from dynctl.simulator.cluster import Cluster


class Watch:
    """Tells of a run what has happened since it was asked last."""

    def __init__(self) -> None:
        self._at_s = 0.0
        self._arrived = self._begun = self._over = 0

    def look(self, run: Cluster) -> Observation:
        """The time since the last look."""
        desk, now_s = run.desk, run.clock.now_s
        came = [run.requests[number] for number in range(self._arrived, run.arrived)]
        begun = [desk.answers[number] for number in desk.begun[self._begun :]]
        over = [desk.answers[number] for number in desk.over[self._over :]]
        prompts = [one.prompt_tokens for one in came]
        read = sum(run.requests[number].prompt_tokens for number in desk.begun[self._begun :])
        ttft = [one.ttft_s for one in begun if one.ttft_s is not None]
        itl = [one.itl_s for one in over if one.itl_s is not None]
        share = run.service.sla.percentile
        seen = Observation(
            span_s=now_s - self._at_s,
            arrivals=len(came),
            roles={group.role: _load(run, group.role) for group in run.service.groups},
            isl=fmean(prompts) if prompts else None,
            isl_cv=pstdev(prompts) / fmean(prompts) if prompts else None,
            osl=_mean(one.tokens for one in over if one.tokens),
            hit_rate=sum(one.cached for one in begun) / read if read else None,
            queued=run.door.waiting,
            ttft_s=quantile(ttft, share),
            itl_s=quantile(itl, share),
            ttft_mean_s=_mean(ttft),
            itl_mean_s=_mean(itl),
        )
        self._at_s, self._arrived = now_s, run.arrived
        self._begun, self._over = len(desk.begun), len(desk.over)
        return seen


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value below which that share of them lies (nearest rank); None of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None


def _load(run: Cluster, role: Role) -> RoleLoad:
    fleet = run.fleet
    loads = {one.key[0]: one.load for one in run.router.eligible(role)}
    workers = []
    for one in fleet.of(role, "ready"):
        load, report = loads[one.id], one.report()
        workers.append(
            WorkerLoad(
                id=one.id,
                prefill_tokens=load.prefill_tokens,
                running=report.running,
                waiting=report.waiting,
                kv_usage=report.kv_usage,
            )
        )
    starting, draining = len(fleet.of(role, "booting")), len(fleet.of(role, "draining"))
    wanted = starting + len(workers)
    return RoleLoad(
        wanted=wanted, ready=len(workers), starting=starting, draining=draining, workers=tuple(workers)
    )
