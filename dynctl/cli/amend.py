"""`dynctl up` on the name of what runs already, and `dynctl rollback`: show the difference, then do it."""

from __future__ import annotations

from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import Force, NoWait, Timeout, confirmed, running, see_through
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.render import data, json_data, prose
from dynctl.cli.up import site
from dynctl.deploy.amend import Amended, amend, apply, former_recipe, same_recipe_as_now
from dynctl.deploy.audit import actor
from dynctl.deploy.replan import Difference, compare
from dynctl.launchers.local import LocalLauncher
from dynctl.protocol.day2 import Actor
from dynctl.recipe.check import check_recipe

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def rollback(
    name: options.Name = None,
    yes: Yes = False,
    timeout: Timeout = 1800.0,
    no_wait: NoWait = False,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Go back to the recipe before the last change, one replica at a time.

    Former recipes are kept in the run directory as recipe.lock.N.yaml, the latest with the highest number.
    Doing it twice comes back to where it was.

    dynctl rollback --yes
    """
    run = running(name)
    loaded = former_recipe(run)
    check_recipe(loaded)
    amended = amend(run, loaded, site(LocalLauncher()))
    who = actor("rollback", force=force)
    return settle(amended, who, timeout, yes=yes, as_json=as_json, no_wait=no_wait)


def settle(
    amended: Amended, who: Actor, timeout: float, *, yes: bool, as_json: bool, no_wait: bool = False
) -> int:
    """Show what differs, ask, and see it through; the exit code."""
    found = compare(amended.old, amended.new)
    name = amended.old.name
    if not found and same_recipe_as_now(amended):
        if as_json:
            json_data({"name": name, "url": amended.old.url, "run_dir": str(amended.run.path), "changed": []})
        else:
            prose(f"{name} runs with this recipe already: {amended.old.url}", style="good")
        return 0
    prose("\n".join(shown(found)) or "no process changes")
    if not confirmed(f"change {name} while it serves?", yes=yes):
        prose("nothing was changed")
        return INTERRUPTED
    changed = {seat: amended.new.process(seat).role for seat in found.changed or {}}
    roles = list(dict.fromkeys(role for role in changed.values() if role != "frontend"))
    apply(amended, site(LocalLauncher()), who, roles)
    code = see_through(amended.run, timeout, as_json=as_json, no_wait=no_wait)
    if not as_json and code == 0:
        data(amended.new.url)
    return code


def shown(found: Difference) -> list[str]:
    """One line for each seat: + added, - removed, ~ replaced and why."""
    lines = [f"+ {seat}" for seat in found.added] + [f"- {seat}" for seat in found.removed]
    return lines + [f"~ {seat}: {', '.join(why)}" for seat, why in (found.changed or {}).items()]
