"""A deployment on Slurm as a login node sees it: what its job does, over what its controller wrote."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from dynctl.deploy.home import RunDir
from dynctl.deploy.state import ENDED, RunState, load_state
from dynctl.deploy.status import view_of
from dynctl.errors import SlurmError
from dynctl.launchers.slurm_client import JobRow
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.deployment import DeploymentView

_REASONS = {
    "Resources": "waits for nodes to become free",
    "Priority": "other jobs come first",
    "ReqNodeNotAvail": "a node it asks for is down, drained or reserved",
    "PartitionTimeLimit": "its time limit is above the partition's: it will never start",
    "PartitionNodeLimit": "the partition does not have so many nodes: it will never start",
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
}


def job_view(state: RunState, run: RunDir, launcher: JobLauncher) -> DeploymentView:
    """The deployment as it is. A controller of Slurm's that does not answer is a reason, not an end."""
    try:
        row, silent = launcher.job(), ""
    except SlurmError as error:
        row, silent = None, error.message
    if silent:
        seen = view_of(state, str(run.path), lambda pid, ticks: state.phase not in ENDED)
        return msgspec.structs.replace(seen, reason=f"this is what was known last: {silent}")
    if row is None and not launcher.over():
        return _waiting(state, run, "job is being submitted")
    if row is not None and row.pending:
        return _waiting(state, run, pending_text(row, None))
    if row is not None and row.active:
        seen = view_of(state, str(run.path), lambda pid, ticks: pid > 0)
        if state.controller.pid or state.phase in ENDED:
            return seen
        told = f"job {row.id} has started on {row.nodes or 'its nodes'}, its controller is starting"
        return msgspec.structs.replace(seen, phase="starting", reason=told)
    seen = view_of(state, str(run.path), lambda pid, ticks: False)
    how = ended_text(row, launcher.record.job_id)
    if state.phase == "failed" or (state.phase == "stopped" and row is not None and row.state == "COMPLETED"):
        return seen
    phase = "failed" if not state.ready_once and state.phase not in ENDED else "stopped"
    return msgspec.structs.replace(seen, phase=phase, reason=how)


def _waiting(state: RunState, run: RunDir, reason: str) -> DeploymentView:
    seen = view_of(state, str(run.path), lambda pid, ticks: False)
    rows = [msgspec.structs.replace(row, state="waiting", pid=0) for row in seen.processes]
    return msgspec.structs.replace(seen, phase="pending", reason=reason, processes=rows)


def pending_text(row: JobRow, place: tuple[int, int] | None) -> str:
    """Why a job waits, since when, and how much longer as far as Slurm can tell."""
    why = _REASONS.get(row.reason, "")
    for (
        known,
        text,
    ) in _REASONS.items():  # some have details: "ReqNodeNotAvail, UnavailableNodes:n4"
        if row.reason.startswith(known):
            why = text
    parts = [f"job {row.id} is pending in partition {row.partition}: {row.reason or 'just submitted'}"]
    parts[0] += f" ({why})" if why else ""
    if place is not None:
        parts.append(f"place {place[0]} of {place[1]}")
    parts.append(f"estimated start {row.start}" if row.start else "no estimated start yet")
    return ", ".join(parts)


def ended_text(row: JobRow | None, job_id: str) -> str:
    """How a job ended."""
    if row is None:
        return f"job {job_id or '(unknown)'} has ended, and Slurm has forgotten it"
    how = _ENDS.get(row.state, f"ended as {row.state}")
    details = f" ({row.reason})" if row.reason and row.state in ("FAILED", "NODE_FAIL", "CANCELLED") else ""
    nodes = f" on {row.nodes}" if row.nodes else ""
    return f"job {row.id}{nodes} {how}{details}"


def describe_pending(launcher: JobLauncher) -> str:
    """`pending_text` with the place in the queue, which costs a call of its own; "" for a job that is not."""
    try:
        row = launcher.job()
        if row is None or not row.pending:
            return ""
        return pending_text(row, launcher.table.client.place_in_queue(row))
    except SlurmError:
        return ""


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
