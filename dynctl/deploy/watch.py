"""Waits for a deployment: every change as it comes, until it is ready, has failed, or time is up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dynctl import procfs
from dynctl.deploy.ask import Health, ask_health
from dynctl.deploy.claim import Up
from dynctl.deploy.home import RunDir
from dynctl.deploy.slurm_view import ended_text, job_changes, refuse_hopeless
from dynctl.deploy.state import RunState, load_state
from dynctl.deploy.status import diagnose, view_of
from dynctl.deploy.stop import CONTROLLER, Stopper, stop_run
from dynctl.errors import LaunchError, NodeSilent, NotReady, PortInUse, ProcessExited
from dynctl.launchers.base import ProcessHandle
from dynctl.launchers.files import write_atomic
from dynctl.launchers.last_lines import tail, telling_lines
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.deployment import DeploymentView
from dynctl.protocol.exits import read_last_words

POLL_S = 0.02
HEALTH_S = 30.0
_FAILED_DRAIN_S = 1.0
_LINES = 10
_PROBE_BYTES = 65536

OnView = Callable[[DeploymentView], None]
AskHealth = Callable[[str], Health]


@dataclass(frozen=True, slots=True)
class Waiter:
    """What waiting needs: processes, time, and somebody to tell."""

    stopper: Stopper
    on_view: OnView
    health: AskHealth = ask_health

    @property
    def now(self) -> float:
        """The time, monotonic."""
        return self.stopper.clock()


def changes(run: RunDir, controller: ProcessHandle, waiter: Waiter) -> Iterator[DeploymentView | None]:
    """The deployment at each change, None when nothing has changed for a moment; ends with its controller."""
    launcher = waiter.stopper.launcher
    if isinstance(launcher, JobLauncher):
        yield from job_changes(run, launcher, POLL_S)
        return
    last = b""
    alive = True
    while True:
        alive = alive and not waiter.stopper.launcher.poll([controller])
        raw = run.state.read_bytes() if run.state.exists() else b""
        state = load_state(run.state) if raw != last else None
        last = raw
        if state is not None:
            yield _view(state, run, controller, alive=alive)
        else:
            yield None
        if not alive:
            return
        waiter.stopper.sleep(POLL_S)


def _view(state: RunState, run: RunDir, controller: ProcessHandle, *, alive: bool) -> DeploymentView:
    if alive and not state.controller.pid:
        # It has not written itself down yet.
        state.controller.pid, state.controller.start_ticks = controller.pid, controller.start_ticks
    return view_of(state, str(run.path), procfs.alive)


def wait_ready(up: Up, waiter: Waiter, timeout_s: float | None) -> None:
    """Return when it is ready and its frontends say so too.

    Otherwise nothing of it is left running (but what was adopted) and the failure is raised: ProcessExited,
    PortInUse, LaunchError, or NotReady at the deadline or when somebody else ended it.
    """
    ends = waiter.now + timeout_s if timeout_s is not None else None
    try:
        view = _wait_phase(up, waiter, ends)
        _wait_health(view, waiter, ends)
    except LaunchError:
        if not up.adopted:
            stop_run(up.run, waiter.stopper, _FAILED_DRAIN_S)
        raise


def _wait_phase(up: Up, waiter: Waiter, ends: float | None) -> DeploymentView:
    view: DeploymentView | None = None
    launcher, began = waiter.stopper.launcher, waiter.now
    for seen in changes(up.run, up.controller, waiter):
        view = seen or view
        if view is not None and view.phase == "pending" and isinstance(launcher, JobLauncher):
            refuse_hopeless(launcher, waiter.now - began)
        if seen is not None:
            waiter.on_view(seen)
            if seen.phase == "ready":
                return seen
        if ends is not None and waiter.now > ends:
            raise _late(up, view)
    raise _ended(up, launcher if isinstance(launcher, JobLauncher) else None)


def _wait_health(view: DeploymentView, waiter: Waiter, ends: float | None) -> None:
    limit = min(waiter.now + HEALTH_S, ends if ends is not None else float("inf"))
    for frontend in [row for row in view.processes if row.role == "frontend"]:
        while reason := waiter.health(frontend.url).reason:
            if waiter.now > limit:
                message = f"'{view.name}' runs, but {frontend.id} is not ready: {reason}"
                raise NotReady(message, where=frontend.url)
            waiter.stopper.sleep(POLL_S)


def _late(up: Up, view: DeploymentView | None) -> NotReady:
    found = diagnose(view, {}) if view is not None else None
    reason, kept = "its controller has not started", f"its logs: dynctl logs {up.name}"
    if found is not None and view is not None:
        nodes = {row.id: row.node for row in view.processes}
        several = found.seat in nodes and len(set(nodes.values())) > 1
        reason = f"{found.reason} (on {nodes[found.seat]})" if several else found.reason
        last = tail(up.run.logs / f"{found.seat}.engine.log", 1) or tail(up.run.logs / f"{found.seat}.log", 1)
        reason += "".join(f"\n  {line}" for line in ([found.error] if found.error else last))
        kept = "its job is cancelled: nothing is left of it" if view.phase == "pending" else kept
    kept = "it is left running" if up.adopted else kept
    return NotReady(f"'{up.name}' was not ready in time: {reason}", where=str(up.run.path), hint=kept)


def _ended(up: Up, job: JobLauncher | None) -> LaunchError:
    """Why the controller is gone before the deployment was ready."""
    state = load_state(up.run.state)
    where, hint = str(up.run.path), f"its logs: dynctl logs {up.name}"
    gone = job.job() if job is not None else None
    if state is not None and (state.phase == "failed" or (state.phase == "stopped" and gone is None)):
        return failure_of(state, where)
    if (full := _unwritable(up.run)) is not None:
        message = f"'{up.name}' could not be started: the run directory cannot be written: {full.strerror}"
        return LaunchError(message, where=where)
    words = _last_words(up.run, state.controller.incarnation or 1 if state is not None else 1)
    lines = telling_lines(tail(up.run.logs / f"{CONTROLLER}.log", 100), _LINES)
    how = ended_text(gone, gone.id) if gone is not None else "the controller ended"
    message = words or "\n".join([how, *(f"  {line}" for line in lines)])
    return LaunchError(f"'{up.name}' could not be started: {message}", where=where, hint=hint)


def _unwritable(run: RunDir) -> OSError | None:
    """Why a file of some size cannot be written in the run directory."""
    try:
        write_atomic(run.path / "probe", bytes(_PROBE_BYTES))
        (run.path / "probe").unlink()
    except OSError as error:
        return error
    return None


def _last_words(run: RunDir, incarnation: int) -> str:
    words = read_last_words(run.path, CONTROLLER, incarnation)
    return words.message if words is not None else ""


def failure_of(state: RunState, where: str) -> LaunchError:
    """The error that a deployment which ended before it was ready ended with."""
    if state.phase == "stopped":
        return NotReady(f"'{state.name}' was ended before it was ready", where=where)
    failed = next((seat for seat in state.seats if seat.state == "failed"), None)
    if failed is not None and failed.last_kind == NodeSilent.kind:
        why = failed.last_exit.removeprefix(f"{failed.node}: ")
        return NodeSilent(
            f"{why}: {failed.id} of '{state.name}' could not be started there",
            where=failed.node,
            hint=f"is it up, and does it let {state.head or 'the controller'} in? then dynctl up again",
        )
    lines = [f"  {line}" for line in failed.last_error] if failed is not None else []
    more = [f"more: dynctl logs {state.name} {failed.id}"] if failed is not None else []
    message = "\n".join([f"'{state.name}' could not be started: {state.reason}", *lines, *more])
    kind = PortInUse if failed is not None and failed.last_kind == PortInUse.kind else ProcessExited
    return kind(message, where=where)
