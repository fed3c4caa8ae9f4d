"""`dynctl drain` and `dynctl undrain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import ANSWER_S, Force, NoWait, Timeout, running, see_through
from dynctl.cli.pick import ask, state
from dynctl.cli.render import prose
from dynctl.cli.restart import chosen, warn
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.audit import actor
from dynctl.deploy.home import RunDir
from dynctl.errors import UsageError
from dynctl.protocol.day2 import Done, DrainCall
from dynctl.protocol.deployment import DeploymentView, ProcessView

Which = Annotated[
    list[str],
    typer.Argument(
        metavar="NODE|ROLE[/I]...", help="Nodes, roles, or single replicas of them.", show_default=False
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="TIME",
        parser=options.duration,
        help="For running requests to end, like 20s; what is left then goes on elsewhere.",
        show_default="the recipe's drain_timeout",
    ),
]
_WAIT_S = 1800.0


def drain(
    which: Which,
    name: options.NameOption = None,
    timeout: Limit = None,
    no_wait: NoWait = False,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Take processes out of service and keep them out.

    They get no new requests; those they have end or go on elsewhere; then they stop, and stay so also when
    the controller is replaced, until dynctl undrain or dynctl restart.

    dynctl drain decode/1; dynctl drain n3 --timeout 2m
    """
    run = running(name)
    seen, _ = ask(run)
    rows = meant(seen, which)
    spare(seen, rows)
    warn(seen, rows)
    args = [*which, *([f"--timeout={timeout:g}s"] if timeout is not None else [])]
    call = DrainCall(
        actor=actor("drain", args, force=force), seats=[row.id for row in rows], limit_s=timeout or 0.0
    )
    send(run, call)
    return see_through(run, _WAIT_S, as_json=as_json, no_wait=no_wait)


def undrain(
    which: Which,
    name: options.NameOption = None,
    timeout: Timeout = 1800.0,
    no_wait: NoWait = False,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Bring drained processes back into service.

    dynctl undrain decode/1; dynctl undrain n3
    """
    run = running(name)
    rows = meant(ask(run)[0], which)
    call = DrainCall(actor=actor("undrain", which, force=force), seats=[row.id for row in rows], back=True)
    send(run, call)
    return see_through(run, timeout, as_json=as_json, no_wait=no_wait)


def send(run: RunDir, call: DrainCall) -> None:
    """Have the controller do it. Raises what it refuses it with."""
    ask_controller(run, state(run).registry, "controller.drain", call, Done, deadline_s=ANSWER_S)


def meant(seen: DeploymentView, words: Sequence[str]) -> list[ProcessView]:
    """The rows on these nodes, and of these roles and replicas. Raises UsageError."""
    found: dict[str, ProcessView] = {}
    nodes = {row.node for row in seen.processes}
    for word in words:
        there = [row for row in seen.processes if row.node == word] if word in nodes else chosen(seen, [word])
        found.update((row.id, row) for row in there)
    return list(found.values())


def spare(seen: DeploymentView, rows: Sequence[ProcessView]) -> None:
    """Say when nothing of a role will be left to serve. Raises UsageError when there is no replica at all."""
    if not rows:
        raise UsageError("nothing to drain")
    for role in dict.fromkeys(row.role for row in rows):
        left = [row for row in seen.processes if row.role == role and row.ready and row not in rows]
        if not left:
            prose(f"no {role} is left to serve", style="warning")
