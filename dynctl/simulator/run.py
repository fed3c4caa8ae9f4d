"""All runs that a task asks for, one after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.simulation import Finished, Policy, Progress, Result, Task, Told
from dynctl.perfmodel.trace import TraceRequest, denser, faster, load_trace
from dynctl.planner.config import PlannerConfig
from dynctl.protocol.instances import Role
from dynctl.simulator.cluster import Cluster, Options, Pilot
from dynctl.simulator.oracle import best, work_of
from dynctl.simulator.pilots import Classic, Planner, Schedule
from dynctl.simulator.report import result_of

Tell = Callable[[Told], None]
_CLASSIC_S = 60.0
"""How often the classic formula is asked where no planner is set up."""
_USUAL = 0.7
"""How busy fixed numbers of replicas are to be where no schedule keeps the SLA."""


def run(task: Task, tell: Tell) -> list[Result]:
    """The runs of a task, each told as it ends. Raises ProfileError: the trace, or what does not fit."""
    config = msgspec.convert(task.planner, PlannerConfig) if task.planner is not None else None
    return Runs(task, requests_of(task), tell).all(config)


def requests_of(task: Task) -> list[TraceRequest]:
    """The trace as it is to be replayed: from 0 on. Raises ProfileError."""
    found = load_trace(Path(task.trace))
    start_s = found[0].at_s
    moved = [msgspec.structs.replace(one, at_s=one.at_s - start_s) for one in found]
    if task.rate_scale != 1.0:
        moved = denser(moved, task.rate_scale, Random(task.seed))
    if not moved:
        raise ProfileError("no request is left of the trace", where=task.trace, hint="a higher --rate-scale")
    return faster(moved, task.speed) if task.speed != 1.0 else moved


class Runs:
    """Runs of one service against the same requests."""

    def __init__(self, task: Task, requests: list[TraceRequest], tell: Tell) -> None:
        self._task = task
        self._requests = requests
        self._tell = tell
        self.last: Cluster | None = None

    def all(self, config: PlannerConfig | None) -> list[Result]:
        """With the planner, or without one as it is; what these are compared with."""
        made = [self.steered("planner", Planner(config))] if config is not None else []
        if config is None or self._task.compare:
            made.append(self.steered("static", None))
        if self._task.compare:
            made += self.beside(config.interval_s if config is not None else _CLASSIC_S)
        return made

    def steered(
        self, policy: Policy, pilot: Pilot | None, replicas: Mapping[Role, int] | None = None
    ) -> Result:
        """One run, told. `replicas`: others than the service's to begin with."""
        began_s = time.monotonic()
        result = self._run(policy, pilot, replicas)
        self._tell(Finished(result=result, took_s=time.monotonic() - began_s))
        return result

    def beside(self, interval_s: float) -> list[Result]:
        """What a planner is compared with; the run before tells what of the prompts is cached."""
        assert self.last is not None
        service, began_s = self._task.service, time.monotonic()
        work = work_of(service, self._requests, self.last.answers)

        def measure(schedule: Schedule) -> Result:
            return self._run("oracle", schedule, schedule.first)

        found = best(service, work, measure)
        took_s = time.monotonic() - began_s
        busy = found[0] if found else {group.role: _USUAL for group in service.groups}
        made = [
            self.steered("peak", None, work.peak(busy)),
            self.steered("mean", None, work.mean(busy)),
            self.steered("classic", Classic(service, interval_s)),
        ]
        if found:
            made.append(found[1])
            self._tell(Finished(result=found[1], took_s=took_s))
        return made

    def _run(self, policy: Policy, pilot: Pilot | None, replicas: Mapping[Role, int] | None) -> Result:
        service = self._task.service
        if replicas is not None:
            groups = tuple(
                msgspec.structs.replace(one, replicas=replicas[one.role]) for one in service.groups
            )
            service = msgspec.structs.replace(service, groups=groups)
        options = Options(
            seed=self._task.seed,
            jumps=not self._task.every_step,
            on_progress=lambda share: self._tell(Progress(policy=policy, share=share)),
        )
        self.last = cluster = Cluster(service, self._requests, pilot, options)
        cluster.run()
        return result_of(policy, cluster, getattr(pilot, "reasons", ()))
