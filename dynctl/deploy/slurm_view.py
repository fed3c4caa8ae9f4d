"""A deployment on Slurm as a login node sees it: what its job does, over what its controller wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec

from dynctl.deploy.home import RunDir
from dynctl.deploy.state import ENDED, RunState, load_state
from dynctl.deploy.status import view_of
from dynctl.errors import SlurmError, SlurmRejected
from dynctl.launchers.slurm_client import JobRow
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.launchers.slurm_job import CONTROLLER, REFUSED, JobLauncher
from dynctl.protocol.deployment import DeploymentView
from dynctl.protocol.exits import read_last_words

_REASONS = {
    "Resources": "waits for nodes to become free",
    "Priority": "other jobs come first",
    "ReqNodeNotAvail": "a node it asks for is down, drained or reserved",
    "PartitionTimeLimit": "its time limit is above the partition's: it will never start",
    "PartitionNodeLimit": "the partition does not have so many nodes: it will never start",
    "PartitionConfig": "the partition does not have what it asks for: it will never start",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition takes no jobs now",
    "AssocGrpGRES": "the account's GPUs are all in use",
    "QOSMaxJobsPerUserLimit": "too many jobs of this user run in its qos",
    "JobHeldUser": "it is held; scontrol release lets it go",
    "JobHeldAdmin": "an administrator holds it",
    "BeginTime": "it was put off to a later time",
    "Dependency": "it waits for another job",
    "Reservation": "its reservation has not begun",
    "BadConstraints": "no node can ever meet what it asks for",
}
NEVER = ("PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS")
"""Reasons that time alone does not cure."""
_SETTLED_S = 5.0
"""A new job may have PartitionConfig for a moment, until Slurm has looked closer."""
_ENDS = {
    "CANCELLED": "was cancelled",
    "TIMEOUT": "was ended at its time limit; slurm.time asks for more",
    "NODE_FAIL": "lost a node",
    "BOOT_FAIL": "lost a node that did not boot",
    "PREEMPTED": "was preempted by another job",
    "OUT_OF_MEMORY": "ran out of memory; slurm.mem asks for more",
    "DEADLINE": "missed its deadline",
    "FAILED": "has failed",
    "COMPLETED": "has ended",
    "COMPLETING": "has ended",
}


def job_view(state: RunState, run: RunDir, launcher: JobLauncher) -> DeploymentView:
    """The deployment as it is. A controller of Slurm's that does not answer is a reason, not an end.

    Raises CodecError for a record that cannot be read.
    """
    try:
        row, silent = launcher.job(), ""
    except SlurmError as error:
        row, silent = None, error.message
    if silent:
        seen = view_of(state, str(run.path), lambda pid, ticks: state.phase not in ENDED, everywhere=True)
        return msgspec.structs.replace(seen, reason=f"this is what was known last: {silent}")
    if row is None and not launcher.over():
        return _waiting(state, run, "job is being submitted")
    if row is not None and row.pending:
        return _waiting(state, run, pending_text(row, None))
    if row is not None and row.active:
        seen = view_of(state, str(run.path), lambda pid, ticks: pid > 0, everywhere=True)
        if state.controller.pid or state.phase in ENDED:
            return seen
        told = f"job {row.id} has started on {row.nodes or 'its nodes'}, its controller is starting"
        return msgspec.structs.replace(seen, phase="starting", reason=told)
    return _left(_over(state, run, launcher, row), state, run, launcher)


def _over(state: RunState, run: RunDir, launcher: JobLauncher, row: JobRow | None) -> DeploymentView:
    """The deployment once its own job has ended."""
    seen = view_of(state, str(run.path), lambda pid, ticks: False, everywhere=True)
    how = ended_text(row, launcher.record.job_id)
    words = read_last_words(run.path, CONTROLLER, max(state.controller.incarnation, 1))
    how += f": {words.message}" if words is not None else ""
    forgotten = state.phase in ENDED and row is None  # Slurm forgets jobs; the state says how it ended
    if (
        forgotten
        or state.phase == "failed"
        or (state.phase == "stopped" and row is not None and row.state == "COMPLETED")
    ):
        return seen
    phase = "failed" if not state.ready_once and state.phase not in ENDED else "stopped"
    return msgspec.structs.replace(seen, phase=phase, reason=how)


def _left(seen: DeploymentView, state: RunState, run: RunDir, launcher: JobLauncher) -> DeploymentView:
    """With what lives on in jobs that have given it nodes: each ends by itself when it has seen the end."""
    jobs: dict[str, str] = {}
    for one in load_follow_ups(run.path):
        try:
            row = launcher.table.row(one.job)
        except SlurmError:
            return seen  # Slurm does not answer any more: nothing is known of them
        jobs |= dict.fromkeys(one.nodes, row.id) if row is not None and row.active else {}
    pids = {seat.id: seat.pid for seat in state.seats if seat.pid and seat.node in jobs}
    if not pids:
        return seen
    rows = [
        msgspec.structs.replace(one, state="stopping", pid=pids[one.id]) if one.id in pids else one
        for one in seen.processes
    ]
    left = ", ".join(sorted({f"job {jobs[row.node]} on {row.node}" for row in rows if row.id in pids}))
    told = f"{seen.reason}; {left} is about to end, dynctl down {seen.name} ends it now"
    return msgspec.structs.replace(seen, processes=rows, reason=told)


def _waiting(state: RunState, run: RunDir, reason: str) -> DeploymentView:
    seen = view_of(state, str(run.path), lambda pid, ticks: False, everywhere=True)
    rows = [msgspec.structs.replace(row, state="waiting", pid=0) for row in seen.processes]
    return msgspec.structs.replace(seen, phase="pending", reason=reason, processes=rows)


def pending_text(row: JobRow, place: tuple[int, int] | None) -> str:
    """Why a job waits, since when, and how much longer as far as Slurm can tell."""
    why = _why(row)
    parts = [f"job {row.id} is pending in partition {row.partition}: {row.reason or 'just submitted'}"]
    parts[0] += f" ({why})" if why else ""
    if place is not None:
        parts.append(f"place {place[0]} of {place[1]}")
    parts.append(f"estimated start {row.start}" if row.start else "no estimated start yet")
    return ", ".join(parts)


def refuse_hopeless(launcher: JobLauncher, waited_s: float = 0.0) -> None:
    """Raises SlurmRejected for a job that will never start as it is, which has been pending for so long."""
    try:
        row = launcher.job()
    except SlurmError:
        return  # Slurm does not answer now: the view of the job says so
    hopeless = (*NEVER, "PartitionConfig") if waited_s > _SETTLED_S else NEVER
    if row is not None and row.pending and row.reason.startswith(hopeless):
        raise SlurmRejected(
            f"job {row.id} cannot start in partition {row.partition}: {row.reason} ({_why(row)})",
            hint="scontrol show partition tells its limits; ask for less, or for another partition",
        )


def _why(row: JobRow) -> str:
    """Slurm's reason in words; some have details behind them: "ReqNodeNotAvail, UnavailableNodes:n4"."""
    return next((text for known, text in _REASONS.items() if row.reason.startswith(known)), "")


def ended_text(row: JobRow | None, job_id: str) -> str:
    """How a job ended."""
    if row is None:
        return f"job {job_id or '(unknown)'} has ended, and Slurm has forgotten it"
    how = _ENDS.get(row.state, f"ended as {row.state}")
    details = f" ({row.reason})" if row.reason and row.state in ("FAILED", "NODE_FAIL") else ""
    nodes = f" on {row.nodes}" if row.nodes else ""
    return f"job {row.id}{nodes} {how}{details}"


def follow_ups(run: RunDir, launcher: JobLauncher) -> list[JobLauncher]:
    """The jobs that give the deployment nodes in the place of lost ones. Raises CodecError."""
    return [
        JobLauncher(launcher.table, one.job, run.path) for one in load_follow_ups(run.path) if one.job.job_id
    ]


def no_successor(run: RunDir) -> str:
    """Why nothing takes over from the deployment's job yet, though it should; "" = all is as it should be."""
    try:
        return (run.path / REFUSED).read_text()
    except OSError:
        return ""


def job_facts(launcher: JobLauncher) -> dict[str, Any]:
    """The job for scripts: what Slurm says of it, its place in the queue (0 = none), and all in a line.

    The place costs a call of its own, made only for a job that is pending.
    """
    facts: dict[str, Any] = {"id": launcher.record.job_id, "state": "UNKNOWN"}
    try:
        row = launcher.job()
        if row is None:
            return {**facts, "line": ended_text(None, launcher.record.job_id)}
        place = launcher.table.client.place_in_queue(row) if row.pending else (0, 0)
    except SlurmError as error:
        return {**facts, "line": str(error)}
    line = (
        pending_text(row, place) if row.pending else running_text(row) if row.active else ended_text(row, "")
    )
    return {
        "id": row.id,
        "state": row.state,
        "reason": row.reason,
        "nodes": row.nodes,
        "partition": row.partition,
        "submitted": row.submitted,
        "start": row.start,
        "end": row.end,
        "time_limit": row.limit,
        "place": place[0],
        "of": place[1],
        "line": line,
    }


def running_text(row: JobRow) -> str:
    """Where a job runs and until when."""
    until = f", until {row.end}" if row.end else ""
    return f"job {row.id} is {row.state.lower()} on {row.nodes} since {row.start}{until}"


def job_changes(run: RunDir, launcher: JobLauncher, poll_s: float) -> Iterator[DeploymentView | None]:
    """The deployment at each change, None when nothing has changed for a moment; ends with its job."""
    last: DeploymentView | None = None
    while True:
        over = launcher.over()
        state = load_state(run.state)
        seen = job_view(state, run, launcher) if state is not None else None
        yield seen if seen != last else None
        last = seen
        if over or (state is not None and state.phase in ENDED):
            return
        time.sleep(poll_s)
