"""A host's side of a deployment that another machine starts and ends: `python -m dynctl.deploy.receive`.

One call as JSON on standard input, one `Answer` as the last line of standard output. What a host does for
`up` at home it does here: the same locks, checks and files.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import msgspec

from dynctl.command import Command
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.claim import may_adopt, new_controller, same_recipe
from dynctl.deploy.gpus import FILE as GPUS_FILE
from dynctl.deploy.gpus import claim_of, locked, require_free
from dynctl.deploy.home import LOCK_S, Home, RunDir, make_private
from dynctl.deploy.state import ENDED, load_state, readable_state, save_state
from dynctl.deploy.status import lock_words
from dynctl.deploy.stop import CONTROLLER, Stopper, stop_run
from dynctl.errors import DynctlError, LaunchError, TransportError, UsageError
from dynctl.launchers.base import Launch, Launcher, RunRef
from dynctl.launchers.local import LocalLauncher
from dynctl.protocol.agent import LookCall, LookReply

CALLED_S = 60
"""For the call to come: the caller waits no longer for its answer. Then this process ends (SIGALRM)."""
_ANSWER_S = 5.0
"""More than an agent needs that is just being started."""
_KILLED_S = 5.0
_POLL_S = 0.02


class Spawn(msgspec.Struct, frozen=True, kw_only=True):
    """A process to be started in a run directory, unless it runs there already. An agent has an `endpoint`,
    at which it must answer, too: one that hangs is ended and started anew.
    """

    process_id: str
    incarnation: int
    argv: list[str]
    env: dict[str, str]
    endpoint: str = ""


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
    """End all processes of a run on this host; not of a locked one, unless by `force`. Answer: `ended`, how
    many there were.
    """

    run_id: str
    drain_s: float
    force: bool = False


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
        _require_living(call.run_id, home)
        if call.adopt:
            run = RunDir(home.runs / call.run_id)
            make_private(run.path)
            if any(one.process_id == CONTROLLER for one in launcher.owned(call.run_id)):
                _spawn(
                    [one for one in call.spawn if one.process_id != CONTROLLER],
                    launcher,
                    RunRef(call.run_id, run.path),
                )
                return Answer(run_dir=str(run.path))
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
        _require_living(call.run_id, home)
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
    try:
        home.prepare()
        with locked(home):  # what is being started is found below, and what comes later is refused
            home.mark_ended(call.run_id)
    except (LaunchError, UsageError) as error:
        # Where nothing can be written nothing can be started; what runs is to be ended all the same.
        sys.stderr.write(f"{error}\n")
    return Answer(ended=stop_run(run, Stopper(launcher), call.drain_s))


def _require_living(run_id: str, home: Home) -> None:
    """A call may be late, behind a link that was cut, and its run ended since. Raises UsageError."""
    if home.is_marked_ended(run_id):
        raise UsageError("the run has been ended meanwhile", where=run_id)


def _spawn(asked: list[Spawn], launcher: Launcher, run: RunRef) -> None:
    """Start what does not run, or hangs; a controller is never there when one is asked for."""
    owned = {one.process_id for one in launcher.owned(run.run_id)}
    for one in asked:
        if one.process_id in owned and one.process_id != CONTROLLER:
            if not one.endpoint or _answers(one.endpoint, RunDir(run.run_dir)):
                continue
            _end(one.process_id, launcher, run)
        command = Command(tuple(one.argv), one.env, str(run.run_dir))
        handle = launcher.start(Launch(one.process_id, one.incarnation, command), run)
        launcher.release(handle)


def _answers(endpoint: str, run: RunDir) -> bool:
    """Whether the agent there does."""
    call = LookCall(procs=[])
    try:
        ask_controller(run, endpoint, "agent.look", call, LookReply, deadline_s=_ANSWER_S)
    except TransportError:
        return False
    return True


def _end(process_id: str, launcher: Launcher, run: RunRef) -> None:
    """Kill an agent that hangs, and its keeper; what it has started lives on. Raises LaunchError."""
    ends = time.monotonic() + _KILLED_S
    while left := [one for one in launcher.owned(run.run_id) if one.process_id == process_id]:
        if time.monotonic() > ends:
            hint = "it hangs in the kernel; only a reboot ends it"
            raise LaunchError(f"{process_id} (pid {left[0].handle.pid}) could not be killed", hint=hint)
        launcher.kill(left)
        time.sleep(_POLL_S)


def main() -> int:
    """Answer the call on standard input; whoever is behind a link that was cut never sends one."""
    signal.alarm(CALLED_S)
    try:
        call = msgspec.json.decode(sys.stdin.buffer.read(), type=Call)
        signal.alarm(0)
        told = answer(call, Home.find(os.environ), LocalLauncher())
    except DynctlError as error:
        told = Answer(error=error.kind, message=error.message, where=error.where, hint=error.hint)
    except (OSError, msgspec.MsgspecError) as error:
        told = Answer(error=LaunchError.kind, message=str(error))
    sys.stdout.write(msgspec.json.encode(told).decode() + "\n")
    return 1 if told.error else 0


if __name__ == "__main__":
    sys.exit(main())
