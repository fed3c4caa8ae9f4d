"""What to do about follow-up jobs, from what Slurm says of them and what is lacking. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dynctl.deploy.plan import Plan
from dynctl.deploy.slurm_view import NEVER, ended_text, pending_text
from dynctl.launchers.slurm_client import JobRow
from dynctl.launchers.slurm_follow import FollowUp

_USABLE = ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING")
"""States in which a job has its nodes, or is about to."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A follow-up job as Slurm has it. `row` None: not listed, `fresh`: because it is so new."""

    follow_up: FollowUp
    row: JobRow | None
    fresh: bool = False

    @property
    def over(self) -> bool:
        """It has ended, or never came to be."""
        if self.row is None:
            return not self.fresh
        return not (self.row.pending or self.row.state in _USABLE)


@dataclass(frozen=True, slots=True)
class Submit:
    """A job for so many nodes of a part is lacking."""

    part: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Take:
    """It runs: use its nodes."""

    follow_up: FollowUp
    row: JobRow


@dataclass(frozen=True, slots=True)
class Widen:
    """It waits, and need not avoid these nodes any longer."""

    follow_up: FollowUp
    row: JobRow
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """Cancel it. `failed`: it would never have helped."""

    follow_up: FollowUp
    why: str
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """It has ended by itself."""

    follow_up: FollowUp
    why: str


Act = Submit | Take | Widen | Release | Forget


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes of the plan (`used`), those that cannot be reached, and of these those that could be again."""

    used: Collection[str] = ()
    lost: Collection[str] = ()
    returned: Collection[str] = ()


def decide(lacking: Mapping[int, int], seen: Sequence[Seen], nodes: Nodes) -> list[Act]:
    """What is to be done next. `lacking`: nodes wanted by part of the job.

    A job is asked for only as far as those that wait, and the idle nodes of those that run, are too few.
    """
    acts: list[Act] = []
    coming = dict.fromkeys(lacking, 0)
    for one in seen:
        follow_up, row, part = one.follow_up, one.row, one.follow_up.part
        wanted = lacking.get(part, 0)
        if one.over:
            acts.append(Forget(follow_up, ended_text(row, follow_up.job.job_id)))
            continue
        if follow_up.nodes and row is not None and (row.pending or row.start != follow_up.started):
            acts.append(Release(follow_up, "Slurm has started it anew", failed=True))
            continue
        if follow_up.nodes:
            idle = [node for node in follow_up.nodes if node not in nodes.used and node not in nodes.lost]
            if not (wanted or set(follow_up.nodes) & set(nodes.used)):
                acts.append(Release(follow_up, "nothing runs on its nodes"))
            coming[part] = coming.get(part, 0) + len(idle)
            continue
        if not wanted:
            acts.append(Release(follow_up, "it is no longer needed"))
            continue
        if row is not None and row.pending and row.reason.startswith(NEVER):
            acts.append(Release(follow_up, pending_text(row, None), failed=True))
            continue
        back = tuple(node for node in follow_up.avoid if node in nodes.returned)
        if row is not None and row.pending and back:
            acts.append(Widen(follow_up, row, back))
        if row is not None and row.state == "RUNNING":
            acts.append(Take(follow_up, row))
        coming[part] = coming.get(part, 0) + follow_up.wanted
    missing = {part: count - coming[part] for part, count in lacking.items()}
    return [*acts, *(Submit(part, count) for part, count in missing.items() if count > 0)]


def one_step_over_nodes(plan: Plan, nodes: Collection[str]) -> list[str]:
    """Replicas with a part on these nodes whose ranks are one step: a step is of one job."""
    hit = {(p.role, p.index) for p in plan.processes if p.kind == "worker" and p.node in nodes}
    engines = [p for p in plan.processes if p.kind == "engine" and (p.role, p.index) in hit]
    spread = [p for p in engines if p.command.argv[0] == "srun" and "--nodes=1" not in p.command.argv]
    return sorted({f"{p.role}-{p.index}" for p in spread})
