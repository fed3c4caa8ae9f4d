"""`dynctl down`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.pick import home, pick
from dynctl.cli.render import json_data, prose
from dynctl.deploy.home import LOCK_S
from dynctl.deploy.state import load_state
from dynctl.deploy.stop import Stopper, stop_run
from dynctl.launchers.local import LocalLauncher

Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="For running requests to end, like 90s or 5m; 0 kills at once.",
    ),
]


def down(name: options.Name = None, timeout: Timeout = 30.0, as_json: options.Json = False) -> None:
    """Drain and end a deployment.

    Frontends stop accepting and finish what they have, then workers do, then whatever is left is killed. Its
    run directory stays: logs, status and events work on.
    """
    run = pick(name)
    state = load_state(run.state)
    called = state.name if state is not None else (name or run.run_id)
    with home().locked(called, deadline_s=LOCK_S):
        ended = stop_run(run, Stopper(LocalLauncher()), timeout)
    if as_json:
        json_data({"name": called, "run_dir": str(run.path), "processes_ended": ended})
    elif ended:
        prose(f"{called} is down", style="good")
    else:
        prose(f"{called} was not running")
