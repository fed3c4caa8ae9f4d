"""Who says how many replicas there are: the planner, the classic formula, a schedule that was made before."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence

from dynctl.perfmodel.simulation import Group, Service
from dynctl.planner import classic
from dynctl.planner.config import PlannerConfig
from dynctl.planner.core import decide
from dynctl.planner.memory import PlannerState
from dynctl.planner.observe import Observation
from dynctl.protocol.instances import Role
from dynctl.simulator.cluster import Cluster
from dynctl.simulator.watch import Watch

_MOST_BATCH = 4096


class Planner:
    """The planner of a deployment. `reasons` are those of the decisions that changed something."""

    def __init__(self, config: PlannerConfig) -> None:
        self.interval_s = config.load_interval_s
        self.reasons: list[str] = []
        self._config = config
        self._state = PlannerState()
        self._watch = Watch()

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        """What it decides now; at the very start there is nothing to go by."""
        now_s = run.clock.now_s
        if not now_s:
            return {}
        made = decide(self._state, self._watch.look(run), self._config, now_s)
        if made.changed:
            self.reasons.append(f"{now_s:.0f} s: {made.reason}")
        return made.targets


class Schedule:
    """A table of replicas by interval, made before."""

    def __init__(self, interval_s: float, rows: Sequence[Mapping[Role, int]]) -> None:
        self.interval_s = interval_s
        self._rows = rows

    @property
    def first(self) -> Mapping[Role, int]:
        """Of the first interval."""
        return self._rows[0]

    def wanted_at(self, interval: int) -> Mapping[Role, int]:
        """Of that interval; the last one goes on."""
        return self._rows[min(len(self._rows) - 1, interval)]

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        """The row of the interval that begins now."""
        return self.wanted_at(round(run.clock.now_s / self.interval_s))


class Classic:
    """The formula with correction factors (`planner.classic`), fed as its planner was: by the requests that
    were *completed* in the last interval, taken for those of the next.

    Where one role does both, it gets the sum of what the formula gives to prefill and decode.
    """

    def __init__(self, service: Service, interval_s: float) -> None:
        self.interval_s = interval_s
        self._service = service
        self._watch = Watch()
        self._over = 0
        self._groups = {group.role: group for group in service.groups}

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        """What the formula says now."""
        seen = self._watch.look(run)
        over = [number for number in run.desk.over[self._over :] if run.desk.answers[number].end == "done"]
        self._over = len(run.desk.over)
        if not over:
            return {}
        isl = sum(run.requests[number].prompt_tokens for number in over) / len(over)
        osl = sum(run.requests[number].output_tokens for number in over) / len(over)
        ahead = classic.Interval(self.interval_s, len(over), isl, osl)
        reader, writer = self._reader, self._writer
        expected_s = reader.profile.step_s(reader.profile.prefill_s(0, round(isl)), 0, 0.0)
        slower = seen.ttft_mean_s / expected_s if seen.ttft_mean_s else 1.0
        rates = (isl / expected_s / reader.gpus, self._writes(seen, writer, isl + osl / 2))
        if reader is not writer:
            sizes = classic.Sizes(reader.gpus, writer.gpus)
            prefill, decode = classic.replicas(ahead, rates, slower, sizes)
            return {"prefill": prefill, "decode": decode}
        busy = min(1.0, slower) * isl / rates[0] + osl / rates[1]
        return {"aggregated": math.ceil(len(over) / self.interval_s * busy / reader.gpus)}

    @property
    def _reader(self) -> Group:
        return self._groups.get("prefill") or self._groups["aggregated"]

    @property
    def _writer(self) -> Group:
        return self._groups.get("decode") or self._groups["aggregated"]

    def _writes(self, seen: Observation, writer: Group, context: float) -> float:
        """Tokens a second and GPU at the largest batch within the corrected ITL."""
        workers = seen.roles[writer.role].workers
        running = sum(one.running for one in workers) / max(1, len(workers))
        expected_s = writer.profile.decode_s(max(1, round(running)), context)
        correction = (seen.itl_mean_s or expected_s) / expected_s if expected_s else 1.0
        sla = self._service.sla
        target_s = classic.itl_target(sla.itl_s, correction) if sla.itl_s is not None else None
        return tokens_a_second(writer, context, target_s) / writer.gpus


def tokens_a_second(group: Group, context: float, itl_s: float | None) -> float:
    """What one replica says at the largest batch that its limits and the ITL allow; at least one sequence."""
    batch = largest_batch(group, context, itl_s)
    return batch / max(1e-9, group.profile.decode_s(batch, context))


def largest_batch(group: Group, context: float, itl_s: float | None) -> int:
    """Sequences of `context` tokens decoded at once within limits and ITL, at least 1."""
    most = min(group.limits.sequences, int(group.limits.kv_tokens // max(1.0, context)), _MOST_BATCH)
    if itl_s is None:
        return max(1, most)
    fit = bisect_right(range(1, most + 1), itl_s, key=lambda batch: group.profile.decode_s(batch, context))
    return max(1, fit)
