"""A command of a user's as it runs beside a seat: on its node, with its engine's environment. Pure."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dynctl.command import Command
from dynctl.deploy.plan import Plan
from dynctl.launchers.base import ENV_PROCESS, ENV_RUN, Launch

EXEC_MOST_S = 50.0
"""For a command that the controller has run elsewhere: a call that takes longer is not answered."""


def beside(plan: Plan, seat: str, argv: Sequence[str]) -> Launch:
    """The start of `argv`: in the engine's directory, with its variables, its programs found first.

    Raises KeyError for a seat that is not in the plan.
    """
    process = plan.process(seat)
    head, dot, part = seat.partition(".")
    engines = [p for p in plan.processes if p.id == f"{head}/engine{dot}{part}"]
    command = (engines or [process])[0].command
    env = {name: value for name, value in command.env.items() if name not in (ENV_RUN, ENV_PROCESS)}
    folder = os.path.dirname(command.argv[0])
    if os.path.isabs(folder):
        env.setdefault("PATH", os.pathsep.join([folder, os.environ.get("PATH", os.defpath)]))
    return Launch(f"{seat}.exec", 0, Command(tuple(argv), env, command.cwd), process.node)
