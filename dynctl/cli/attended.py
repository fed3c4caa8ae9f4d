"""A deployment that has just been started, attended until it is ready, and longer unless told to detach."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.live import follow, screen, ways_back
from dynctl.cli.pick import meant_names, state
from dynctl.cli.render import data, json_data, program, prose
from dynctl.deploy.claim import Up
from dynctl.deploy.stop import Stopper
from dynctl.deploy.watch import Waiter, wait_ready

Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return when it is ready.")]


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


def attended(started: Up, stopper: Stopper, timeout: float | None, *, detach: bool, as_json: bool) -> int:
    """Wait until it is ready, say so, and stay unless told to detach."""
    name, ready = started.name, False
    try:
        with screen() as shown:
            wait_ready(started, Waiter(stopper, shown.show), timeout)
        ready = True
        started = started if started.url else replace(started, url=state(started.run).url)
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
    which = "" if meant_names() == [started.name] else f" --name {started.name}"
    prose(f"try: {program()} chat{which} 'Hello'   end: {program()} down {started.name}")
