"""Whose a name is: free, taken, or of a run that lives without a controller and may get another."""

from __future__ import annotations

from dataclasses import dataclass

from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.state import ENDED, ControllerRecord, RunState, readable_state
from dynctl.deploy.stop import CONTROLLER
from dynctl.errors import UsageError
from dynctl.launchers.base import Launcher, ProcessHandle


@dataclass(frozen=True, slots=True)
class Up:
    """A deployment whose controller has been started. `adopted`: processes of it lived already."""

    name: str
    run: RunDir
    url: str
    controller: ProcessHandle
    adopted: bool


def may_adopt(home: Home, launcher: Launcher, name: str, lock: str) -> RunDir | None:
    """As `claim`: `lock` is the recipe that is to run."""
    run = home.run_of(name)
    owned = launcher.owned(run.run_id) if run else []
    if run is None or not owned:
        return None
    ways = f"dynctl status {name} shows it, dynctl down {name} ends it"
    if any(o.process_id == CONTROLLER for o in owned):
        raise UsageError(f"'{name}' is running already", where=str(run.path), hint=ways)
    state = readable_state(run.state)
    if state is None or state.phase in ENDED or not same_recipe(run, lock):
        again = f"{ways}, dynctl up {run.lock} looks after it again"
        raise UsageError(
            f"processes of an earlier '{name}' still run, from another recipe",
            where=str(run.path),
            hint=again,
        )
    return run


def same_recipe(run: RunDir, lock: str) -> bool:
    """Whether the run was made from a recipe that resolves to the same, wherever it was written."""
    try:
        return same_text(run.lock.read_text(), lock)
    except OSError:
        return False


def same_text(one: str, other: str) -> bool:
    """Whether two resolved recipes say the same but for their comments."""

    def body(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("#")]

    return body(one) == body(other)


def new_controller(state: RunState) -> RunState:
    """The state that the next controller of a run begins with."""
    state.phase = "degraded" if state.ready_once else "starting"
    state.reason = "a new controller is starting"
    state.controller = ControllerRecord(incarnation=state.controller.incarnation + 1)
    return state
