"""`dynctl up`."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.live import follow, screen, ways_back
from dynctl.cli.pick import home, running_names
from dynctl.cli.render import data, json_data, program, prose
from dynctl.deploy.amend import amend
from dynctl.deploy.audit import actor
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import build_plan
from dynctl.deploy.run import Checked, Site, Up, UpRequest, check, start
from dynctl.deploy.seats import RunContext
from dynctl.deploy.state import ENDED, readable_state
from dynctl.deploy.stop import CONTROLLER, Stopper
from dynctl.deploy.watch import Waiter, wait_ready
from dynctl.launchers.local import LocalLauncher

CHANGE_S = 1800.0
"""For a change of what runs to be done, when nobody says otherwise."""

Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before GPUs are taken.")]
Bootstrap = Annotated[
    bool, typer.Option("--bootstrap", help="Target ssh: install this dynctl on hosts that lack it.")
]
Wheelhouse = Annotated[
    Path | None,
    typer.Option(
        "--wheelhouse",
        metavar="DIR",
        help="With --bootstrap: wheels of all it needs, for hosts without network.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Change it also when it is locked.")]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="Give up and end it when it is not ready by then, like 90s or 5m.",
        show_default=False,
    ),
]


def up(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.Recipe,
    detach: Detach = False,
    yes: Yes = False,
    timeout: Timeout = None,
    target: options.Target = None,
    inventory: options.Inventory = None,
    bootstrap: Bootstrap = False,
    wheelhouse: Wheelhouse = None,
    sets: options.Set = None,
    unsets: options.Unset = None,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Start what a recipe says and serve it.

    Stays and shows the deployment; Ctrl-C leaves it running. If it cannot become ready, nothing is left
    running. On the name of a deployment that runs: shows what would change, asks, and changes it one replica
    at a time. On one whose controller has died: a new controller takes over what still lives.
    """
    chosen = [f"target={target}"] if target is not None else []
    checked = check(UpRequest(recipe, [*(sets or ()), *chosen], unsets or (), inventory))
    for warning in checked.warnings:
        prose(warning, style="warning")
    if not yes and not confirmed(checked):
        prose("nothing was started")
        return INTERRUPTED
    if checked.loaded.recipe.target == "ssh":
        from dynctl.cli.up_ssh import How, up_over_ssh

        return up_over_ssh(checked, How(detach, timeout, as_json, bootstrap, wheelhouse))
    launcher = LocalLauncher()
    run = supervised(checked.loaded.recipe.name, launcher)
    if run is not None:
        from dynctl.cli.amend import settle

        who = actor("up", [str(recipe), *(sets or ())], force=force)
        amended = amend(run, checked.loaded, site(launcher), checked.inventory)
        return settle(amended, who, timeout or CHANGE_S, yes=yes, as_json=as_json)
    started = start(checked, site(launcher))
    try:
        return attended(started, Stopper(launcher), timeout, detach=detach, as_json=as_json)
    finally:
        launcher.release(started.controller)


def supervised(name: str, launcher: LocalLauncher) -> RunDir | None:
    """The run of this name, when a controller looks after it on this machine."""
    run = home().run_of(name)
    if run is None or not any(o.process_id == CONTROLLER for o in launcher.owned(run.run_id)):
        return None
    kept = readable_state(run.state)
    return run if kept is not None and kept.phase not in ENDED else None


def site(launcher: LocalLauncher) -> Site:
    """This machine, this user, this python."""
    return Site(home(), launcher, os.environ, sys.executable, metadata.version("dynctl"))


def confirmed(checked: Checked) -> bool:
    """Ask a person before GPUs are taken; true off a terminal, and when none are."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    preview = RunContext("RUN_ID", "RUN_DIR", sys.executable)
    plan = build_plan(checked.loaded, checked.inventory, (), preview)
    gpus = sum(len(node.gpus) for node in plan.nodes)
    if not gpus:
        return True
    names = ", ".join(node.name for node in plan.nodes)
    return typer.confirm(f"start {plan.name} on {names} with {gpus} GPUs?", default=True, err=True)


def attended(started: Up, stopper: Stopper, timeout: float | None, *, detach: bool, as_json: bool) -> int:
    """Wait until it is ready, say so, and stay unless told to detach."""
    name = started.name
    if started.adopted:
        prose(f"{name}: a new controller takes over what lives")
    ready = False
    try:
        with screen() as shown:
            wait_ready(started, Waiter(stopper, shown.show), timeout)
        ready = True
        announce(started, as_json=as_json)
        return 0 if detach else follow(started.run, started.controller, stopper)
    except KeyboardInterrupt:
        prose(f"\nleft {name} {'running' if ready else 'starting'}; {ways_back(name)}")
        return 0 if ready else INTERRUPTED


def announce(started: Up, *, as_json: bool) -> None:
    """Say that it is ready, and where."""
    if as_json:
        json_data({"name": started.name, "url": started.url, "run_dir": str(started.run.path)})
        return
    data(started.url)
    prose(f"{started.name} is ready: {started.url}", style="good")
    which = "" if running_names() == [started.name] else f" --name {started.name}"
    prose(f"try: {program()} chat{which} 'Hello'   end: {program()} down {started.name}")
