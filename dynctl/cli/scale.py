"""`dynctl scale`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.amend import shown
from dynctl.cli.changes import Force, NoWait, Timeout, require_answers, running, see_through, tell_lost
from dynctl.cli.render import json_data, prose
from dynctl.cli.up import site
from dynctl.deploy.amend import apply, rescaled
from dynctl.deploy.audit import actor
from dynctl.deploy.replan import compare
from dynctl.errors import UsageError
from dynctl.launchers.local import LocalLauncher

_WORD = re.compile(r"([a-z]+)=(\d+)")

Roles = Annotated[
    list[str],
    typer.Argument(metavar="ROLE=N...", help="How many replicas of which roles.", show_default=False),
]


def scale(
    roles: Roles,
    name: options.NameOption = None,
    timeout: Timeout = 1800.0,
    no_wait: NoWait = False,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Add or remove replicas while it serves.

    What is there stays where it is; new replicas get GPUs that are free on the deployment's hosts. The
    highest numbers are removed: they leave routing, end their requests (what is left at drain_timeout goes
    on elsewhere), then stop. Exit 4 when it does not fit. On Slurm what does not fit waits for nodes of a
    further job, which is given back with it; exit 4 when Slurm does not give them.

    dynctl scale prefill=3 decode=2; dynctl scale aggregated=4 --name chat
    """
    wanted = counts(roles)
    run = running(name)
    here = site(LocalLauncher())
    amended = rescaled(run, wanted, here)
    found = compare(amended.old, amended.new)
    if not (found.added or found.removed):
        if as_json:
            json_data({"name": amended.old.name, "added": [], "removed": []})
        else:
            prose(f"{amended.old.name}: nothing to do")
        return 0
    require_answers(amended, found.removed, "removed")
    prose("\n".join(shown(replace(found, changed=None))))
    tell_lost(amended)
    apply(amended, actor("scale", roles, force=force), ())
    return see_through(run, timeout, as_json=as_json, no_wait=no_wait)


def counts(words: Sequence[str]) -> dict[str, int]:
    """Replicas by role. Raises UsageError."""
    found = {}
    for word in words:
        match = _WORD.fullmatch(word)
        if match is None:
            raise UsageError(f"'{word}' is not ROLE=N", hint="such as decode=3")
        found[match[1]] = int(match[2])
    return found
