"""`dynctl wait`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import POLL_S
from dynctl.cli.pick import ask, pick
from dynctl.cli.render import json_data, prose
from dynctl.cli.status import as_object, ask_frontends, look_closer
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import Diagnosis
from dynctl.errors import NotReady, ProcessExited, UsageError
from dynctl.protocol.deployment import DeploymentView

GOALS = ("ready", "settled", "degraded", "down")

Goal = Annotated[
    str,
    typer.Option("--for", metavar="|".join(GOALS), help="What to wait for.", show_default=True),
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="Give up then, exit 6.",
        show_default="5m",
    ),
]


def wait(
    name: options.Name = None, goal: Goal = "ready", timeout: Timeout = 300.0, as_json: options.Json = False
) -> int:
    """Return when a deployment is as wanted.

    ready: everything serves, and the frontends say so too. settled: ready, and no restart, scale or other
    change is under way. degraded: something is missing. down: it has ended. Exit 6 at the deadline, with the
    reason as status gives it; 5 when it has failed or ended instead.

    dynctl wait --for ready --timeout 10m && dynctl chat Hello
    """
    if goal not in GOALS:
        raise UsageError(f"cannot wait for '{goal}'", hint=f"one of {', '.join(GOALS)}")
    run = pick(name, ended=True)
    ends = time.monotonic() + timeout
    while True:
        seen, silent = ask(run)
        health = ask_frontends(seen) if seen.phase == "ready" else {}
        found = look_closer(seen, silent, health)
        if reached(goal, seen, found):
            if as_json:
                json_data(as_object(seen, found, ()))
            else:
                prose(f"{seen.name} is {goal}", style="good")
            return 0
        raise_hopeless(goal, seen, found)
        if time.monotonic() > ends:
            raise NotReady(f"'{seen.name}' is not {goal}: {why(seen, found)}", where=seen.run_dir)
        time.sleep(POLL_S)


def reached(goal: str, seen: DeploymentView, found: Diagnosis) -> bool:
    """Whether it is so."""
    match goal:
        case "ready":
            return found.ready
        case "settled":
            return found.ready and not seen.changing
        case "degraded":
            return seen.phase == "degraded"
    return seen.phase in ENDED


def raise_hopeless(goal: str, seen: DeploymentView, found: Diagnosis) -> None:
    """Raise ProcessExited when it will never be so: it has ended, or has given up."""
    if goal == "down":
        return
    gave_up = goal != "degraded" and any(row.state == "failed" and not row.surge for row in seen.processes)
    if seen.phase in ENDED or gave_up:
        raise ProcessExited(f"'{seen.name}' is {seen.phase}: {why(seen, found)}", where=seen.run_dir)


def why(seen: DeploymentView, found: Diagnosis) -> str:
    """The reason, as `status` has it."""
    text = found.reason or seen.changing or f"it is {seen.phase}"
    return f"{text}\n  {found.error}" if found.error else text
