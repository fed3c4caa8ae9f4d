"""A host's side of a deployment that another machine starts and ends: `python -m dynctl.deploy.receive`.

One call as JSON on standard input, one `Answer` as the last line of standard output. What a host does for
`up` at home it does here: the same locks, checks and files.
"""

from __future__ import annotations

import os
import sys

import msgspec

from dynctl.command import Command
from dynctl.deploy.claim import may_adopt, new_controller, same_recipe
from dynctl.deploy.gpus import FILE as GPUS_FILE
from dynctl.deploy.gpus import claim_of, locked, require_free
from dynctl.deploy.home import LOCK_S, Home, RunDir, make_private
from dynctl.deploy.state import ENDED, load_state, readable_state, save_state
from dynctl.deploy.status import lock_words
from dynctl.deploy.stop import CONTROLLER, Stopper, stop_run
from dynctl.errors import DynctlError, LaunchError, UsageError
from dynctl.launchers.base import Launch, Launcher, RunRef
from dynctl.launchers.local import LocalLauncher


class Spawn(msgspec.Struct, frozen=True, kw_only=True):
    """A process to be started in a run directory, unless it runs there already."""

    process_id: str
    incarnation: int
    argv: list[str]
    env: dict[str, str]


class Look(msgspec.Struct, frozen=True, kw_only=True, tag="look"):
    """Is there a deployment of this name? `lock` is the recipe it is to be, resolved.

    Answer: `run_id` and `plan` of one that lives and is the same; `running`: its controller lives too.
    """

    name: str
    lock: str


class Claim(msgspec.Struct, frozen=True, kw_only=True, tag="claim"):
    """On the head: make the run of a name, unless it is there and to be adopted, and start its processes.

    Answer: `run_dir`.
    """

    name: str
    run_id: str
    files: dict[str, str]
    spawn: list[Spawn]
    adopt: bool = False
    gpus: list[int] = []
    share_gpus: bool = False


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """On a further node: make its directory in the run, and start its agent. Answer: `run_dir`."""

    name: str
    run_id: str
    node: str
    files: dict[str, str]
    spawn: list[Spawn]
    gpus: list[int] = []
    share_gpus: bool = False


class Sweep(msgspec.Struct, frozen=True, kw_only=True, tag="sweep"):
    """End all processes of a run on this host; not of a locked one, unless by `force`. With its name in
    `forget` its directories here are removed, too. Answer: `ended`, how many there were.
    """

    run_id: str
    drain_s: float
    force: bool = False
    forget: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a call; with an `error` nothing else."""

    run_dir: str = ""
    run_id: str = ""
    plan: str = ""
    running: bool = False
    ended: int = 0
    error: str = ""
    message: str = ""
    where: str = ""
    hint: str = ""


Call = Look | Claim | Join | Sweep


def answer(call: Call, home: Home, launcher: Launcher) -> Answer:
    """Do what is asked. Raises DynctlError."""
    match call:
        case Look():
            return _look(call, home, launcher)
        case Claim():
            return _claim(call, home, launcher)
        case Join():
            return _join(call, home, launcher)
        case Sweep():
            return _sweep(call, home, launcher)


def _look(call: Look, home: Home, launcher: Launcher) -> Answer:
    home.prepare()
    there = home.run_of(call.name)
    running = there is not None and any(o.process_id == CONTROLLER for o in launcher.owned(there.run_id))
    if there is not None and running and same_recipe(there, call.lock):
        run: RunDir | None = there
    else:
        run = may_adopt(home, launcher, call.name, call.lock)
    if run is None:
        return Answer()
    return Answer(run_id=run.run_id, run_dir=str(run.path), plan=run.plan.read_text(), running=running)


def _claim(call: Claim, home: Home, launcher: Launcher) -> Answer:
    home.prepare()
    with home.locked(call.name, deadline_s=LOCK_S), locked(home):
        if call.adopt:
            run = RunDir(home.runs / call.run_id)
            make_private(run.path)
            if any(one.process_id == CONTROLLER for one in launcher.owned(call.run_id)):
                return Answer(run_dir=str(run.path))  # somebody else was quicker
            state = load_state(run.state)
            if state is None:
                raise LaunchError("the run has no state", where=str(run.state))
            save_state(run.state, new_controller(state))
        else:
            before = home.run_of(call.name)
            if before is not None and launcher.owned(before.run_id):
                raise UsageError(f"'{call.name}' has just been started by another", where=str(before.path))
            run = home.create_run(call.run_id, _with_gpus(call, home))
            home.point(call.name, run)
        _spawn(call.spawn, launcher, RunRef(call.run_id, run.path))
    return Answer(run_dir=str(run.path))


def _join(call: Join, home: Home, launcher: Launcher) -> Answer:
    home.prepare()
    with locked(home):  # until its agent lives, by which the claim counts
        there = home.create_node(call.run_id, call.node, _with_gpus(call, home))
        _spawn(call.spawn, launcher, RunRef(call.run_id, there.path))
    return Answer(run_dir=str(there.path))


def _with_gpus(call: Claim | Join, home: Home) -> dict[str, str]:
    """The files of the directory, and the GPUs taken. Raises PlacementError when another has them."""
    if not call.share_gpus:
        require_free(home, call.gpus, call.run_id)
    claim = claim_of(call.name, call.run_id, call.gpus, shared=call.share_gpus)
    return {**call.files, GPUS_FILE: claim}


def _sweep(call: Sweep, home: Home, launcher: Launcher) -> Answer:
    run = RunDir(home.runs / call.run_id)
    state = readable_state(run.state)
    if state is not None and state.locked is not None and state.phase not in ENDED and not call.force:
        raise UsageError(
            f"'{state.name}' is locked by {lock_words(state.locked)}", hint="dynctl unlock, or --force"
        )
    ended = stop_run(run, Stopper(launcher), call.drain_s)
    if call.forget:
        home.forget_run(call.forget, call.run_id)
    return Answer(ended=ended)


def _spawn(asked: list[Spawn], launcher: Launcher, run: RunRef) -> None:
    """Start what does not run; a controller is never there when this is called."""
    owned = {one.process_id for one in launcher.owned(run.run_id)}
    for one in asked:
        if one.process_id in owned and one.process_id != CONTROLLER:
            continue
        command = Command(tuple(one.argv), one.env, str(run.run_dir))
        handle = launcher.start(Launch(one.process_id, one.incarnation, command), run)
        launcher.release(handle)


def main() -> int:
    """Answer the call on standard input."""
    try:
        call = msgspec.json.decode(sys.stdin.buffer.read(), type=Call)
        told = answer(call, Home.find(os.environ), LocalLauncher())
    except DynctlError as error:
        told = Answer(error=error.kind, message=error.message, where=error.where, hint=error.hint)
    except (OSError, msgspec.MsgspecError) as error:
        told = Answer(error=LaunchError.kind, message=str(error))
    sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    return 1 if told.error else 0


if __name__ == "__main__":
    sys.exit(main())
