"""`dynctl attend`: what `up` on another machine has the head do, once its controller has been started."""

from __future__ import annotations

from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.attended import Detach, Timeout, attended
from dynctl.cli.pick import pick, state
from dynctl.deploy.claim import Up
from dynctl.deploy.stop import CONTROLLER, Stopper
from dynctl.errors import LaunchError
from dynctl.launchers.base import ProcessHandle
from dynctl.launchers.local import LocalLauncher

Adopted = Annotated[bool, typer.Option("--adopted", help="Leave it running when it does not become ready.")]


def attend(
    name: options.Name = None,
    detach: Detach = False,
    timeout: Timeout = None,
    adopted: Adopted = False,
    as_json: options.Json = False,
) -> int:
    """Wait until a deployment that was just started is ready, and stay, as `up` does."""
    run = pick(name)
    launcher = LocalLauncher()
    found = state(run)
    controllers = [o.handle for o in launcher.owned(run.run_id) if o.process_id == CONTROLLER]
    handle = controllers[0] if controllers else ProcessHandle(found.controller.pid or 1, 0, 0)
    if not controllers and not found.controller.pid and found.phase == "starting":
        raise LaunchError("the controller has ended", where=str(run.path), hint=f"dynctl logs {found.name}")
    started = Up(found.name, run, found.url, handle, adopted)
    return attended(started, Stopper(launcher), timeout, detach=detach, as_json=as_json)
