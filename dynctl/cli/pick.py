"""Which deployment a verb is about: the one named, else the only one that runs."""

from __future__ import annotations

import os
from pathlib import Path

from dynctl import procfs
from dynctl.deploy.ask import ask_controller, listens
from dynctl.deploy.home import Home, RunDir, is_trial
from dynctl.deploy.slurm_view import follow_ups, job_view
from dynctl.deploy.state import ENDED, RunState, load_state
from dynctl.deploy.status import view_of
from dynctl.deploy.stop import CONTROLLER
from dynctl.errors import CodecError, DynctlError, UsageError
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.launchers.slurm_job import JobLauncher, JobTable, load_record
from dynctl.protocol.deployment import DeploymentView

_ANSWER_S = 2.0
_REACHED_S = 0.3
ENV_NAME = "DYNCTL_NAME"
"""Names the deployment for a verb that another machine has this one run."""
ENV_RUN_ID = "DYNCTL_RUN_ID"
"""With it: the run that is meant, whatever runs under the name by now."""


class Elsewhere(Exception):
    """The deployment is looked after by another machine: the verb is to run there."""

    def __init__(self, run: RunDir) -> None:
        super().__init__(str(run.path))
        self.run = run


def home() -> Home:
    """The home of this user's runs."""
    return Home.find(os.environ)


_tables: dict[Path, JobTable] = {}
"""One for each home: all of its jobs are looked at in one call."""


def launcher_of(run: RunDir) -> LocalLauncher | JobLauncher:
    """What knows the processes of a run: this machine, or Slurm for a job. Raises CodecError."""
    record = load_record(run.path)
    if record is None:
        return LocalLauncher()
    place = home()
    if place.root not in _tables:
        runs = [one for name in place.names() if (one := place.run_of(name)) is not None]
        records = [found for one in runs if (found := load_record(one.path)) is not None]
        records += [more.job for one in runs for more in load_follow_ups(one.path)]
        _tables[place.root] = JobTable(SlurmClient(), records)
    return JobLauncher(_tables[place.root], record, run.path)


def view(run: RunDir) -> DeploymentView:
    """The deployment as its state file and the living processes say. Raises UsageError without a state."""
    found = state(run)
    launcher = launcher_of(run)
    if isinstance(launcher, JobLauncher):
        return job_view(found, run, launcher)
    if found.phase not in ENDED and not found.controller.pid:
        # It has been started but not yet written itself down: not a deployment that has ended.
        for owned in LocalLauncher().owned(run.run_id):
            if owned.process_id == CONTROLLER:
                found.controller.pid, found.controller.start_ticks = (
                    owned.handle.pid,
                    owned.handle.start_ticks,
                )
    return view_of(found, str(run.path), procfs.alive)


def ask(run: RunDir) -> tuple[DeploymentView, str]:
    """The deployment as its controller sees it now, and why the controller could not be asked ("" = it was).

    Without an answer it is what `view` gives.
    """
    if load_record(run.path) is not None and (answer := _answer_of_job(run)) is not None:
        return answer, ""
    seen = view(run)
    if not seen.controller_pid:
        return seen, ""
    try:
        return _answer(run, state(run).registry), ""
    except DynctlError as error:
        return seen, str(error)


def _answer_of_job(run: RunDir) -> DeploymentView | None:
    """What the controller in a job says, without a question to Slurm; None when Slurm has to be asked."""
    found = state(run)
    if found.phase in ENDED or not found.registry or not listens(found.registry, _REACHED_S):
        return None
    try:
        return _answer(run, found.registry)
    except DynctlError:
        return None


def _answer(run: RunDir, endpoint: str) -> DeploymentView:
    return ask_controller(run, endpoint, "controller.status", None, DeploymentView, deadline_s=_ANSWER_S)


def state(run: RunDir) -> RunState:
    """What the run's state file says. Raises UsageError when there is none."""
    found = load_state(run.state)
    if found is None:
        raise UsageError("this run has no state", where=str(run.path), hint="its directory can be removed")
    return found


def pick(name: str | None, *, ended: bool = False) -> RunDir:
    """The run of `name`; without a name the only one running, or with `ended` else the latest of all, those
    left out that a profile run measures.

    Raises UsageError that lists the names, Elsewhere.
    """
    run = _pick(name or os.environ.get(ENV_NAME), ended=ended)
    if run.remote.exists():
        raise Elsewhere(run)
    return run


def _found(place: Home, name: str) -> RunDir | None:
    """A deployment here, or the note of one elsewhere: not where another machine has this verb run."""
    note = place.note_of(name) if ENV_NAME not in os.environ else None
    return note or place.run_of(name)


def _pick(name: str | None, *, ended: bool) -> RunDir:
    place = home()
    names = place.names()
    if name is not None:
        run = _found(place, name)
        if run is None:
            listed = f"there are: {', '.join(names)}" if names else "there are none; dynctl up starts one"
            raise UsageError(f"no deployment '{name}'", hint=listed)
        meant = os.environ.get(ENV_RUN_ID, "")
        if meant and name == os.environ.get(ENV_NAME) and run.run_id != meant:
            raise UsageError(
                f"'{name}' is another run by now: {run.run_id} took the place of {meant}",
                where=str(run.path),
                hint="nothing was done; it is looked after from where it was started",
            )
        return run
    names, running = [one for one in names if not is_trial(one)], meant_names()
    if len(running) == 1:
        names = running
    elif running:
        listed = ", ".join(running)
        raise UsageError("several deployments run", hint=f"name one, as an argument or by --name: {listed}")
    elif not ended or not names:
        listed = f"ended ones: {', '.join(names)}" if names else "dynctl up starts one"
        raise UsageError("no deployment runs", hint=listed)
    runs = [run for n in names if (run := _found(place, n)) is not None]
    return max(runs, key=lambda run: run.path.stat().st_mtime)


def meant_names() -> list[str]:
    """Those that run and may be meant without being named: not what a profile run measures."""
    return [name for name in running_names() if not is_trial(name)]


def running_names() -> list[str]:
    """All deployments that run."""
    place = home()
    return [name for name in place.names() if _runs(place, name)]


def _runs(place: Home, name: str) -> bool:
    run = _found(place, name)
    try:
        if run is not None and run.remote.exists():
            return b'"ended":false' in run.remote.read_bytes()
        if run is None or state(run).phase in ENDED:
            return False
        return view(run).phase not in ENDED or _lives(run)
    except (CodecError, UsageError):
        return False


def _lives(run: RunDir) -> bool:
    """Whether anything of it does: workers in follow-up jobs may outlive its own job for a moment."""
    launcher = launcher_of(run)
    jobs = follow_ups(run, launcher) if isinstance(launcher, JobLauncher) else []
    return any(one.owned(run.run_id) for one in (launcher, *jobs))
