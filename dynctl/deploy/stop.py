"""`down`: the plan backwards, with the controller's help when there is one, and without it when there is not.

What is ended is found by the run's id in the environment of processes, so this works at any stage of a start.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dynctl.deploy.ask import ask_controller
from dynctl.deploy.events import append_event
from dynctl.deploy.home import RunDir
from dynctl.deploy.state import ENDED, RunState, readable_state, save_state, stop_margin_of
from dynctl.errors import DynctlError, LaunchError, SlurmError
from dynctl.launchers.base import Launcher, Owned, heads
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_client import JobRow
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.launchers.slurm_job import ABANDONED, SUCCESSOR, JobLauncher, load_record
from dynctl.protocol.deployment import DownCall, DownReply

logger = logging.getLogger(__name__)

CONTROLLER = "controller"
_ANSWER_S = 5.0
_KILL_S = 10.0
_POLL_S = 0.02
_CANCELLED_S = 60.0
"""Slurm's own KillWait is 30 s, and a node that is slow to answer adds to it."""
_LISTED_S = 10.0
_JOB_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Stopper:
    """What ending a run needs: how to find processes, and the time."""

    launcher: Launcher
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


def stop_run(run: RunDir, stopper: Stopper, drain_s: float) -> int:
    """End all processes of a run; how many there were. Raises LaunchError when some could not be ended.

    Running requests have `drain_s` to end, first at the frontends, then at the workers.
    """
    if isinstance(stopper.launcher, JobLauncher):
        return stop_job(run, stopper, stopper.launcher, drain_s)
    owned = stopper.launcher.owned(run.run_id)
    state = readable_state(run.state)
    if any(o.process_id == CONTROLLER for o in owned) and state is not None:
        _let_controller(run, state, stopper, drain_s)
    _end(run, stopper, [CONTROLLER], signal.SIGKILL, _KILL_S)
    left = stopper.launcher.owned(run.run_id)
    frontends = [o.process_id for o in left if o.process_id.startswith("frontend-")]
    wait_s = drain_s + stop_margin_of(state) if drain_s else 0.0
    _end(run, stopper, frontends, signal.SIGTERM, wait_s)
    _end(run, stopper, None, signal.SIGTERM, wait_s)
    _kill_all(run, stopper)
    _record(run)
    return len(owned)


def stop_job(run: RunDir, stopper: Stopper, launcher: JobLauncher, drain_s: float) -> int:
    """End the job of a run, wherever it is in its life; 1 when any job of it was left.

    Raises SlurmError, LaunchError.
    Its controller is asked first, over the network, then by a signal; then Slurm ends the job.
    """
    _end_successor(run, launcher)
    row = launcher.job(fresh=True)
    if row is None and not launcher.over():
        _abandon(run)
        row = _found(stopper, launcher)
    if row is None or not (row.active or row.pending):
        _record(run)
        return int(_end_follow_ups(run, stopper, launcher))
    state = readable_state(run.state)
    led = row.active and state is not None and bool(state.registry) and drain_s > 0
    if led and state is not None and not _let_controller(run, state, stopper, drain_s):
        launcher.signal(launcher.handle(), signal.SIGTERM)
        _wait(run, stopper, None, 2 * (drain_s + stop_margin_of(state)))
    ends = stopper.clock() + _CANCELLED_S
    asked = False
    while launcher.owned(run.run_id):
        if not asked:
            launcher.table.client.cancel(row.id)
            asked = True
        if stopper.clock() > ends:
            hint = f"squeue -j {row.id} shows it; a lost node holds it up until Slurm gives the node up"
            raise SlurmError(f"job {row.id} was cancelled but has not ended", where=row.nodes, hint=hint)
        stopper.sleep(_JOB_POLL_S)
    _record(run)
    _end_follow_ups(run, stopper, launcher)
    return 1


def _end_follow_ups(run: RunDir, stopper: Stopper, launcher: JobLauncher) -> bool:
    """Cancel the jobs that gave it more nodes, and see them ended; whether there were any. Raises SlurmError.

    Its controller has done so already, if it could.
    """
    ends = stopper.clock() + _CANCELLED_S
    asked: set[str] = set()
    while True:
        rows = [launcher.table.row(one.job, fresh=True) for one in load_follow_ups(run.path)]
        left = [row for row in rows if row is not None and (row.active or row.pending)]
        if not left:
            return bool(asked)
        for row in left:
            if row.id not in asked:
                launcher.table.client.cancel(row.id)
                asked.add(row.id)
        if stopper.clock() > ends:
            told = f"job {left[0].id}, which gave it nodes, was cancelled but has not ended"
            raise SlurmError(told, where=left[0].nodes, hint=f"squeue -j {left[0].id} shows it")
        stopper.sleep(_JOB_POLL_S)


def _end_successor(run: RunDir, launcher: JobLauncher) -> None:
    """Cancel the job that was to take over from this one. Raises SlurmError."""
    try:
        run_id = (run.path / SUCCESSOR).read_text()
    except OSError:
        return
    record = load_record(run.path.parent / run_id)
    row = launcher.table.row(record, fresh=True) if record is not None else None
    if row is not None and (row.active or row.pending):
        launcher.table.client.cancel(row.id)


def _abandon(run: RunDir) -> None:
    """A job that Slurm does not list yet is to end as soon as it begins."""
    try:
        write_atomic(run.path / ABANDONED, "")
    except OSError as error:
        logger.warning("run.unwritable error=%s", error)


def _found(stopper: Stopper, launcher: JobLauncher) -> JobRow | None:
    """The job once Slurm lists it; None when it has not for a while."""
    ends = stopper.clock() + _LISTED_S
    while stopper.clock() < ends:
        row = launcher.job()
        if row is not None:
            return row
        stopper.sleep(_JOB_POLL_S)
    return None


def _let_controller(run: RunDir, state: RunState, stopper: Stopper, drain_s: float) -> bool:
    """Ask the controller to end the run and wait until it has gone; False for one that does not answer."""
    try:
        ask_controller(
            run,
            state.registry,
            "controller.down",
            DownCall(drain_s=drain_s),
            DownReply,
            deadline_s=_ANSWER_S,
        )
    except DynctlError as error:
        logger.info("controller.silent error=%s", error)
        return False
    wait_s = 2 * (drain_s + stop_margin_of(state)) + _KILL_S if drain_s else _KILL_S
    _wait(run, stopper, [CONTROLLER], wait_s)
    return True


def _end(
    run: RunDir, stopper: Stopper, ids: Sequence[str] | None, signum: signal.Signals, wait_s: float
) -> None:
    """Signal the processes of these seats (None = all), engines by their sidecars, and wait for their end."""
    chosen = _of(stopper.launcher.owned(run.run_id), ids)
    if not chosen or not wait_s:
        return
    for process in heads(chosen):
        stopper.launcher.signal(process.handle, signum)
    _wait(run, stopper, ids, wait_s)


def _wait(run: RunDir, stopper: Stopper, ids: Sequence[str] | None, wait_s: float) -> None:
    ends = stopper.clock() + wait_s
    while stopper.clock() < ends and _of(stopper.launcher.owned(run.run_id), ids):
        stopper.sleep(_POLL_S)


def _of(owned: Sequence[Owned], ids: Sequence[str] | None) -> list[Owned]:
    return [o for o in owned if ids is None or o.process_id in ids]


def _kill_all(run: RunDir, stopper: Stopper) -> None:
    ends = stopper.clock() + _KILL_S
    while left := stopper.launcher.owned(run.run_id):
        if stopper.clock() > ends:
            names = ", ".join(f"{o.process_id} (pid {o.handle.pid})" for o in left)
            raise LaunchError(
                f"could not be killed: {names}", hint="they hang in the kernel; try again later"
            )
        stopper.launcher.kill(left)
        stopper.sleep(_POLL_S)


def _record(run: RunDir) -> None:
    """Write down that the run is over, unless its controller has. Nothing lives that would still write."""
    state = readable_state(run.state)
    if state is None or state.phase in ENDED:
        return
    state.phase, state.reason = "stopped", ""
    for seat in state.seats:
        seat.pid = seat.start_ticks = seat.pgid = seat.engine_pid = 0
        seat.state = "failed" if seat.state == "failed" else "stopped"
    try:
        save_state(run.state, state)
        append_event(run.events, time.time(), "deployment.stopped", by="down")
    except OSError as error:
        # All is ended, which is what was asked for; a full disk must not make that a failure.
        logger.warning("state.unwritable error=%s", error)
