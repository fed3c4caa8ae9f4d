"""`dynctl exec`."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

from dynctl import procfs
from dynctl.cli import options
from dynctl.cli.changes import Force, running
from dynctl.cli.drain import meant
from dynctl.cli.pick import ask, launcher_of, state
from dynctl.cli.render import json_data
from dynctl.deploy.amend import read_plan
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.audit import actor, note
from dynctl.deploy.beside import EXEC_MOST_S, beside
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.status import lock_words
from dynctl.errors import LaunchError, UsageError
from dynctl.launchers.base import ENV_PROCESS, ENV_RUN
from dynctl.launchers.local import LocalLauncher, environment_for
from dynctl.protocol.day2 import ExecCall, ExecReply
from dynctl.protocol.deployment import ProcessView

Where = Annotated[
    str,
    typer.Argument(metavar="ROLE/I|NODE", help="A process, or a node with any.", show_default=False),
]
What = Annotated[
    list[str], typer.Argument(metavar="-- CMD...", help="The command and its arguments.", show_default=False)
]
Timeout = Annotated[
    float,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="Elsewhere than here: kill it then.",
        show_default="50s, which is the most",
    ),
]


def execute(
    where: Where,
    command: What,
    name: options.NameOption = None,
    timeout: Timeout = EXEC_MOST_S,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Run a command beside a worker, with its engine's environment; exits as the command does.

    On this machine it has this terminal; on another node it reads nothing and its output is shown at its
    end. Its environment is the engine's: variables, directory, virtual environment first in PATH.

    dynctl exec decode/0 -- nvidia-smi; dynctl exec n3 -- python -c 'import torch; print(torch.__version__)'
    """
    run = running(name)
    row = meant(ask(run)[0], [where])[0]
    plan = read_plan(run)
    if is_here(run, plan, row):
        return run_here(run, plan, row, command, force=force, as_json=as_json)
    call = ExecCall(
        actor=actor("exec", [row.id, command[0]], force=force), seat=row.id, argv=command, timeout_s=timeout
    )
    reply = ask_controller(
        run, plan.registry, "controller.exec", call, ExecReply, deadline_s=EXEC_MOST_S + 10.0
    )
    tell(row, reply, as_json=as_json)
    return shell_code(reply.code)


def is_here(run: RunDir, plan: Plan, row: ProcessView) -> bool:
    """Whether that process is on this machine and needs nobody to reach it."""
    reached = any(node.agent for node in plan.nodes) or not isinstance(launcher_of(run), LocalLauncher)
    marks = procfs.environment(row.pid) if row.pid else {}
    return not reached or (marks.get(ENV_RUN), marks.get(ENV_PROCESS)) == (plan.run_id, row.id)


def run_here(
    run: RunDir, plan: Plan, row: ProcessView, command: list[str], *, force: bool, as_json: bool
) -> int:
    """Run it with this terminal. Raises UsageError when the deployment is locked, LaunchError."""
    who = actor("exec", [row.id, command[0]], force=force)
    locked = state(run).locked
    if locked is not None and not force:
        note(run, who, "refused: locked")
        raise UsageError(
            f"'{plan.name}' is locked by {lock_words(locked)}",
            where=str(run.path),
            hint="dynctl unlock, or --force",
        )
    launch = beside(plan, row.id, command)
    try:
        done = subprocess.run(
            launch.command.argv,
            env=environment_for(launch, ""),
            cwd=launch.command.cwd,
            capture_output=as_json,
            check=False,
        )
    except OSError as error:
        note(run, who, "failed")
        raise LaunchError(f"{command[0]} cannot be started: {error.strerror}", where=row.node) from error
    note(run, who, f"exit {done.returncode}")
    if as_json:
        tell(row, ExecReply(code=done.returncode, stdout=done.stdout, stderr=done.stderr), as_json=True)
    return shell_code(done.returncode)


def tell(row: ProcessView, reply: ExecReply, *, as_json: bool) -> None:
    """Show what the command said."""
    out, err = (text.decode(errors="replace") for text in (reply.stdout, reply.stderr))
    if as_json:
        json_data({"process": row.id, "node": row.node, "code": reply.code, "stdout": out, "stderr": err})
        return
    sys.stdout.write(out)
    sys.stdout.flush()
    sys.stderr.write(err)


def shell_code(code: int) -> int:
    """An exit code as shells give it: 128 and the signal's number for one that was killed."""
    return 128 - code if code < 0 else code
