"""`dynctl restart`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import Force, NoWait, Timeout, require_answers, running, see_through
from dynctl.cli.pick import ask
from dynctl.cli.render import prose
from dynctl.cli.up import site
from dynctl.deploy.amend import apply, unchanged
from dynctl.deploy.audit import actor
from dynctl.errors import UsageError
from dynctl.launchers.local import LocalLauncher
from dynctl.protocol.deployment import DeploymentView, ProcessView

Which = Annotated[
    list[str],
    typer.Argument(metavar="ROLE[/I]...", help="Roles, or single replicas of them.", show_default=False),
]


def restart(
    which: Which,
    name: options.NameOption = None,
    timeout: Timeout = 1800.0,
    no_wait: NoWait = False,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Replace processes by new ones, one replica at a time, without losing a request.

    Where GPUs are free one replica more is started first and stands in until the last is replaced. Each
    worker leaves routing, ends its requests (what is left at drain_timeout goes on elsewhere), stops, and is
    started anew. A frontend that is alone is away for a moment; with frontend.replicas 2 or more none is.

    dynctl restart decode; dynctl restart decode/0 prefill; dynctl restart frontend --name chat
    """
    run = running(name)
    seen, _ = ask(run)
    rows = chosen(seen, which)
    roles = list(dict.fromkeys(row.role for row in rows if row.role != "frontend"))
    warn(seen, rows)
    amended = unchanged(run, site(LocalLauncher()))
    require_answers(amended, [row.id for row in rows], "restarted")
    who = actor("restart", which, force=force)
    apply(amended, who, roles, [row.id for row in rows])
    return see_through(run, timeout, as_json=as_json, no_wait=no_wait)


def chosen(seen: DeploymentView, words: Sequence[str]) -> list[ProcessView]:
    """The rows that are meant by ROLE, ROLE/I or ROLE-I. Raises UsageError."""
    found: dict[str, ProcessView] = {}
    for word in words:
        role, _, index = word.replace("/", "-").partition("-")
        rows = [row for row in seen.processes if row.role == role and (not index or str(row.index) == index)]
        if not rows:
            there = ", ".join(dict.fromkeys(row.id for row in seen.processes))
            raise UsageError(f"no process '{word}'", hint=f"there are: {there}")
        found.update((row.id, row) for row in rows if not row.surge)
    return list(found.values())


def warn(seen: DeploymentView, rows: Sequence[ProcessView]) -> None:
    """Say when nobody can connect for a moment."""
    doors = [row for row in seen.processes if row.role == "frontend"]
    if len(doors) == 1 and doors[0] in rows:
        prose("one frontend: nobody can connect while it is replaced", style="warning")
