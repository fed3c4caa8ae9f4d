"""`dynctl down`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.pick import home, launcher_of, pick
from dynctl.cli.render import json_data, prose
from dynctl.deploy.audit import actor, note
from dynctl.deploy.home import LOCK_S
from dynctl.deploy.state import ENDED, drain_of, readable_state
from dynctl.deploy.status import lock_words
from dynctl.deploy.stop import Stopper, stop_run
from dynctl.errors import UsageError

Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="For running requests to end, like 20s; default and most: the recipe's drain_timeout. 0 kills.",
    ),
]


Force = Annotated[bool, typer.Option("--force", help="Also when it is locked.")]
Forget = Annotated[
    bool,
    typer.Option("--forget", help="By SSH: free its name although hosts of it are gone for good."),
]


Remove = Annotated[
    bool, typer.Option("--remove", help="Its run directories too, on all its hosts: no logs, no status.")
]


def down(
    name: options.Name = None,
    timeout: Timeout = None,
    force: Force = False,
    forget: Forget = False,
    remove: Remove = False,
    as_json: options.Json = False,
) -> None:
    """Drain and end a deployment.

    Frontends stop accepting and finish what they have, then workers do, then whatever is left is killed. Its
    run directory stays, unless --remove is said: logs, status and events work on.
    """
    run = pick(name)
    if forget:
        raise UsageError("no host of it can be gone: it is not run by SSH", hint="down without --forget")
    state = readable_state(run.state)
    drain_s = drain_of(state) if timeout is None else timeout
    called = state.name if state is not None else (name or run.run_id)
    who = actor("down", force=force)
    if state is not None and state.locked is not None and not force and state.phase not in ENDED:
        refused = f"'{called}' is locked by {lock_words(state.locked)}"
        note(run, who, f"refused: {refused}")
        raise UsageError(refused, where=str(run.path), hint="dynctl unlock, or --force")
    with home().locked(called, deadline_s=LOCK_S):
        ended = stop_run(run, Stopper(launcher_of(run)), drain_s)
    note(run, who, "done")
    if remove:
        home().forget(called)
    if as_json:
        json_data({"name": called, "run_dir": str(run.path), "processes_ended": ended})
    elif ended:
        prose(f"{called} is down", style="good")
    else:
        prose(f"{called} was not running")
