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


SETTLED_S = 10.0
"""After its submission nothing is waited for any more."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A follow-up job as Slurm has it. `row` None: not listed, `fresh`: because it is so new. `waited_s`:
    since it was submitted.
    """

    follow_up: FollowUp
    row: JobRow | None
    fresh: bool = False
    waited_s: float = 0.0

    @property
    def over(self) -> bool:
        """It has ended, or never came to be."""
        if self.row is None:
            return not self.fresh
        return not (self.row.pending or self.row.state in _USABLE)

    @property
    def unsettled(self) -> bool:
        """Slurm is about to say which nodes it gets, or why it waits: soon, at least."""
        row, new = self.row, self.waited_s < SETTLED_S
        if self.follow_up.nodes or self.over or not new:
            return False
        return row is None or (not row.nodes if row.active else not row.reason)

    @property
    def hopeless(self) -> str:
        """Why it will never start; "" = it may."""
        never = self.row is not None and self.row.pending and self.row.reason.startswith(NEVER)
        return pending_text(self.row, None) if self.row is not None and never else ""


@dataclass(frozen=True, slots=True)
class Lacking:
    """So many nodes of a part of the job. `grows`: for more replicas, else in the place of lost ones.
    `whole`: of use only when they are of one job.
    """

    part: int
    nodes: int
    grows: bool = False
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Submit:
    """A job for so many nodes of a part is lacking."""

    part: int
    nodes: int
    grows: bool = False


@dataclass(frozen=True, slots=True)
class Take:
    """It runs: use its nodes."""

    follow_up: FollowUp
    row: JobRow


@dataclass(frozen=True, slots=True)
class Avoid:
    """It waits, and is to avoid just these nodes from now on: some are back, or another job has got some."""

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


Act = Submit | Take | Avoid | Release | Forget


@dataclass(frozen=True, slots=True)
class Nodes:
    """Nodes in use, those that cannot be reached, and of these those that could be again."""

    used: Collection[str] = ()
    lost: Collection[str] = ()
    returned: Collection[str] = ()


def decide(
    lacking: Sequence[Lacking], seen: Sequence[Seen], nodes: Nodes, wait_most_s: float = 0.0
) -> list[Act]:
    """What is to be done next.

    A job is asked for only as far as those that wait, and the idle nodes of those that run, are too few;
    what is more than enough is given back, idle nodes last. `wait_most_s` is how long a job for more
    replicas may be pending, 0 = as long as it takes.
    """
    acts: list[Act] = []
    coming: dict[int, list[int]] = {}
    open_: dict[int, int] = {}
    for lack in lacking:
        open_[lack.part] = open_.get(lack.part, 0) + lack.nodes
    wanted = dict(open_)
    for one in sorted(seen, key=_worth):
        follow_up, part = one.follow_up, one.follow_up.part
        ended = _ended(one, wait_most_s if wanted.get(part) else 0.0)
        if ended is not None:
            acts.append(ended)
            continue
        if follow_up.nodes:
            if not (open_.get(part, 0) > 0 or set(follow_up.nodes) & set(nodes.used)):
                acts.append(Release(follow_up, "nothing runs on its nodes"))
                continue
            idle = [node for node in follow_up.nodes if node not in nodes.used and node not in nodes.lost]
            open_[part] = open_.get(part, 0) - len(idle)
            coming.setdefault(part, []).append(len(idle))
            continue
        if open_.get(part, 0) <= 0:
            acts.append(Release(follow_up, "it is no longer needed"))
            continue
        open_[part] -= follow_up.wanted
        coming.setdefault(part, []).append(follow_up.wanted)
        acts += _next(one, seen, nodes)
    if any(one.unsettled for one in seen):
        return acts  # the next job must avoid the nodes that this one gets
    return [*acts, *_submits(lacking, coming)]


def _worth(one: Seen) -> tuple[bool, bool]:
    """Those whose nodes are used go first, then those that run."""
    return not one.follow_up.nodes, one.row is None or one.row.pending


def _ended(one: Seen, wait_most_s: float) -> Release | Forget | None:
    """What becomes of one that is over or cannot help; None = it may."""
    follow_up, row = one.follow_up, one.row
    if one.over:
        return Forget(follow_up, ended_text(row, follow_up.job.job_id))
    if row is None:
        return None
    if follow_up.nodes:
        anew = row.pending or row.start != follow_up.started
        return Release(follow_up, "Slurm has started it anew", failed=True) if anew else None
    if one.hopeless:
        return Release(follow_up, one.hopeless, failed=True)
    if follow_up.grows and row.pending and 0.0 < wait_most_s < one.waited_s:
        why = f"{pending_text(row, None)}: it has waited longer than slurm.grow_within, {wait_most_s:g} s"
        return Release(follow_up, why, failed=True)
    return None


def _next(one: Seen, seen: Sequence[Seen], nodes: Nodes) -> list[Act]:
    """What a job that is needed, and not used yet, is good for now."""
    follow_up, row = one.follow_up, one.row
    if row is not None and row.state == "RUNNING":
        return [Take(follow_up, row)]
    given = {node for other in seen for node in other.follow_up.nodes}
    avoid = tuple(sorted(given | (set(follow_up.avoid) - set(nodes.returned))))
    return (
        [Avoid(follow_up, row, avoid)] if row is not None and row.pending and avoid != follow_up.avoid else []
    )


def _submits(lacking: Sequence[Lacking], coming: Mapping[int, list[int]]) -> list[Submit]:
    """A job for each of the nodes that are of use together, less those that come already."""
    made = []
    for lack in sorted(lacking, key=lambda one: (one.grows, not one.whole)):
        open_ = lack.nodes
        jobs = coming.get(lack.part, [])
        for number, nodes in enumerate(jobs):
            if lack.whole and nodes < lack.nodes:
                continue
            given = min(open_, nodes)
            open_, jobs[number] = open_ - given, nodes - given
        if open_:
            made.append(Submit(lack.part, open_, lack.grows))
    return made


def lost_groups(plan: Plan, lost: Collection[str]) -> tuple[set[str], list[tuple[str, int]]]:
    """The lost nodes that are made up for one by one, and, by role, how many nodes a replica needs at once
    whose ranks are one step: a step is of one job.
    """
    hit = [p for p in plan.processes if p.kind == "worker" and any(node in lost for node, _ in p.spots)]
    apart = {process.node for process in hit if not process.also}
    return apart & set(lost), [(process.role, len(process.spots)) for process in hit if process.also]
