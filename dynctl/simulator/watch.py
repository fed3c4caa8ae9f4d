"""What a planner is told of a run: the same observation as of a real deployment.

What is read off frontends' histograms there (the spread of prompts, TTFT and ITL at a percentile) is read off
histograms with the same buckets here. The mean gap is that of the answers that have ended, where frontends
count each gap as it comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import accumulate
from statistics import fmean

from dynctl.deploy import figures
from dynctl.observability.catalogue import FRONTEND
from dynctl.observability.metrics import Histogram
from dynctl.planner.figures import spread
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role
from dynctl.simulator.cluster import Cluster

_BOUNDS = {metric.name: metric.buckets for metric in FRONTEND if metric.buckets}


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
        spoken = [one for one in over if one.itl_s is not None]
        gaps_s = sum((one.itl_s or 0.0) * (one.tokens - 1) for one in spoken)
        share = run.service.sla.percentile
        seen = Observation(
            span_s=now_s - self._at_s,
            arrivals=len(came),
            roles={group.role: _load(run, group.role) for group in run.service.groups},
            isl=fmean(prompts) if prompts else None,
            isl_cv=spread(_buckets("input_sequence_tokens", prompts)),
            osl=_mean(one.tokens for one in over if one.tokens),
            hit_rate=sum(one.cached for one in begun) / read if read else None,
            queued=run.door.waiting,
            ttft_s=_told("time_to_first_token_seconds", ttft, share),
            itl_s=_told("time_per_output_token_seconds", (one.itl_s or 0.0 for one in spoken), share),
            ttft_mean_s=_mean(ttft),
            itl_mean_s=gaps_s / sum(one.tokens - 1 for one in spoken) if spoken else None,
        )
        self._at_s, self._arrived = now_s, run.arrived
        self._begun, self._over = len(desk.begun), len(desk.over)
        return seen


def quantile(values: Iterable[float], share: float) -> float | None:
    """The value below which that share of them lies (nearest rank); None of none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else None


def _buckets(metric: str, values: Iterable[float]) -> dict[float, float]:
    """As a frontend's histogram of that name has them: cumulative count by upper bound."""
    histogram = Histogram(_BOUNDS[metric])
    for value in values:
        histogram.observe(value)
    return dict(zip((*histogram.bounds, math.inf), accumulate(histogram.counts), strict=True))


def _told(metric: str, values: Iterable[float], share: float) -> float | None:
    return figures.quantile(_buckets(metric, values).items(), share)


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
    starting, draining = len(fleet.of(role, "booting", "waiting")), len(fleet.of(role, "draining"))
    wanted = starting + len(workers)
    return RoleLoad(
        wanted=wanted, ready=len(workers), starting=starting, draining=draining, workers=tuple(workers)
    )
