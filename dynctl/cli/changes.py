"""What verbs that change a running deployment share: their options, who asks, and seeing it through."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.pick import ask, pick, state
from dynctl.cli.remedies import new_controller
from dynctl.cli.render import columns_of, cut, json_data, program, prose
from dynctl.deploy.amend import Amended
from dynctl.deploy.home import RunDir
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import ready_counts
from dynctl.errors import NodeSilent, NotReady, PeerLost, ProcessExited, SlurmRejected, UsageError
from dynctl.protocol.deployment import DeploymentView

POLL_S = 0.2
SILENT_S = 15.0
ANSWER_S = 10.0

Force = Annotated[bool, typer.Option("--force", help="Also when the deployment is locked.")]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="Stop waiting then, exit 6; what was begun goes on.",
        show_default="30m",
    ),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Return when it has begun.")]


def running(name: str | None) -> RunDir:
    """The run a change is for. Raises UsageError when no controller looks after it."""
    run = pick(name)
    seen, _ = ask(run)
    if not seen.controller_pid:
        raise UsageError(
            f"'{seen.name}' has no controller to change it", where=str(run.path), hint=new_controller(run)
        )
    return run


def require_answers(amended: Amended, seats: Collection[str], doing: str) -> None:
    """See that the nodes these seats are on can be asked to do it: nothing is waited for that may never come.
    Raises NodeSilent.
    """
    lost, name = amended.room.lost, amended.old.name
    for process in amended.old.processes:
        silent = [node for node, _ in process.spots if node in lost]
        if process.id in seats and silent:
            raise NodeSilent(
                f"{process.id} cannot be {doing} now: {lost[silent[0]]}",
                where=silent[0],
                hint=f"nothing was changed; {program()} status {name} tells what helps",
            )


def tell_lost(amended: Amended) -> None:
    """Say which nodes a change does without."""
    for node, why in amended.room.lost.items():
        prose(f"{node}: nothing new is started there: {why}", style="warning")


def see_through(run: RunDir, timeout_s: float, *, as_json: bool, no_wait: bool = False) -> int:
    """Tell what goes on until all is as it is to be; the exit code.

    Raises NotReady at the deadline, ProcessExited when something new does not live, SlurmRejected when the
    nodes for more replicas are not to be had, PeerLost without a controller.
    """
    began = time.monotonic()
    name = state(run).name
    told = ""

    def show(seen: DeploymentView) -> None:
        nonlocal told
        line = f"{seen.name}: ready {ready_counts(seen)}: {seen.changing}"
        line += f" ({seen.reason})" if seen.reason and "awaits a node" in line else ""
        if seen.changing and line != told:
            prose(cut(line, columns_of(sys.stderr)))
        told = line

    try:
        seen = ask(run)[0] if no_wait else until_settled(run, timeout_s, show)
    except KeyboardInterrupt:
        prose(f"\nleft; it goes on: {program()} wait {name} --for settled")
        return INTERRUPTED
    if seen.declined and not no_wait:
        raise SlurmRejected(seen.declined, hint="the deployment goes on with what it has")
    seconds = round(time.monotonic() - began, 1)
    if as_json:
        json_data(
            {"name": name, "phase": seen.phase, "ready": ready_counts(seen), "changing": seen.changing}
            | {"seconds": seconds}
        )
    else:
        prose(f"{name}: {'begun' if no_wait else 'done'}, ready {ready_counts(seen)}", style="good")
    return 0


def until_settled(
    run: RunDir, timeout_s: float, show: Callable[[DeploymentView], None] = lambda seen: None
) -> DeploymentView:
    """The deployment once nothing of it is being replaced, added or removed. Raises as `see_through`."""
    ends = time.monotonic() + timeout_s
    heard = time.monotonic()
    while True:
        seen, silent = ask(run)
        if seen.controller_pid and not silent:
            heard = time.monotonic()
            show(seen)
            if not seen.changing:
                return seen
            raise_failed(seen, run)
        elif seen.phase in ENDED:
            raise ProcessExited(
                f"'{seen.name}' ended meanwhile: {seen.reason or seen.phase}", where=str(run.path)
            )
        elif time.monotonic() - heard > SILENT_S:
            raise PeerLost(f"the controller of '{seen.name}' is gone", where=str(run.path), hint=silent)
        if time.monotonic() > ends:
            raise NotReady(f"'{seen.name}' is not done: {seen.changing}", where=str(run.path))
        time.sleep(POLL_S)


def raise_failed(seen: DeploymentView, run: RunDir) -> None:
    """Raise ProcessExited when a process that was to be new has been given up."""
    for row in seen.processes:
        if row.state == "failed" and f"{row.id} is failed" in seen.changing:
            lines = "".join(f"\n  {line}" for line in row.last_error)
            raise ProcessExited(
                f"{row.id} gave up: {row.last_exit}{lines}",
                where=str(run.path),
                hint=f"the others serve on as before; {program()} rollback {seen.name} goes back",
            )


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask a person, unless told not to. Raises UsageError where there is nobody to ask."""
    if yes:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("not done: there is nobody to ask", hint="--yes does it")
    return typer.confirm(question, default=True, err=True)
