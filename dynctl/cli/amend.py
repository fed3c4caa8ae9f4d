"""`dynctl up` on the name of what runs already, and `dynctl rollback`: show the difference, then do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import Force, NoWait, Timeout, confirmed, running, see_through, tell_lost
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.pick import ask, home, launcher_of
from dynctl.cli.render import data, json_data, prose
from dynctl.cli.up import site
from dynctl.cli.wait import wait
from dynctl.deploy.amend import Amended, amend, apply, former_recipe
from dynctl.deploy.audit import actor
from dynctl.deploy.claim import same_recipe
from dynctl.deploy.home import RunDir
from dynctl.deploy.replan import Difference, compare
from dynctl.deploy.run import Checked
from dynctl.deploy.state import ENDED, readable_state
from dynctl.deploy.stop import CONTROLLER
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.day2 import Actor
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe

CHANGE_S = 1800.0
"""For a change to be done, when nobody says otherwise."""

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Next = Annotated[str, typer.Option("--recipe", metavar="FILE", help="Its name in the run directory.")]


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
    return settle(amended, who, Asked(timeout, yes, as_json, no_wait))


@dataclass(frozen=True, slots=True)
class Asked:
    """How the user wants it. `timeout_s` None: as long as it takes within reason."""

    timeout_s: float | None
    yes: bool
    as_json: bool
    no_wait: bool = False


def supervised(name: str, launcher: LocalLauncher) -> RunDir | None:
    """The run of this name, when a controller looks after it on this machine."""
    run = home().run_of(name)
    if run is None or not any(o.process_id == CONTROLLER for o in launcher.owned(run.run_id)):
        return None
    kept = readable_state(run.state)
    return run if kept is not None and kept.phase not in ENDED else None


def supervised_job(name: str) -> RunDir | None:
    """The run of this name, when it is a job of Slurm's that runs and its controller looks after it."""
    run = home().run_of(name)
    if run is None:
        return None
    kept, launcher = readable_state(run.state), launcher_of(run)
    if kept is None or kept.phase in ENDED or not kept.registry or not isinstance(launcher, JobLauncher):
        return None
    row = launcher.job()
    return run if row is not None and row.active else None


def up_again(checked: Checked, run: RunDir, who: Actor, asked: Asked) -> int:
    """`up` on what runs already; the exit code."""
    amended = amend(run, checked.loaded, site(LocalLauncher()), checked.inventory)
    return settle(amended, who, asked)


def apply_next(
    recipe: Next,
    name: options.Name = None,
    yes: Yes = False,
    timeout: Timeout = 1800.0,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Apply the recipe that `up` on another machine has put into the run directory."""
    run = running(name)
    there = run.next(recipe)
    try:
        loaded = load_recipe(there, environ={})
    finally:
        there.unlink(missing_ok=True)
    check_recipe(loaded)
    who = actor("up", [recipe], force=force)
    return settle(amend(run, loaded, site(LocalLauncher())), who, Asked(timeout, yes, as_json))


def settle(amended: Amended, who: Actor, asked: Asked) -> int:
    """Show what differs, ask, and see it through; the exit code."""
    found = compare(amended.old, amended.new)
    name = amended.old.name
    timeout_s = asked.timeout_s if asked.timeout_s is not None else CHANGE_S
    if not found and same_recipe(amended.run, amended.lock):
        if ask(amended.run)[0].phase == "starting":
            wait(name, "ready", timeout_s)
        if asked.as_json:
            json_data({"name": name, "url": amended.old.url, "run_dir": str(amended.run.path), "changed": []})
        else:
            prose(f"{name} runs with this recipe already: {amended.old.url}", style="good")
        return 0
    prose("\n".join(shown(found)) or "no process changes")
    if not confirmed(f"change {name} while it serves?", yes=asked.yes):
        prose("nothing was changed")
        return INTERRUPTED
    changed = {seat: amended.new.process(seat).role for seat in found.changed or {}}
    roles = list(dict.fromkeys(role for role in changed.values() if role != "frontend"))
    tell_lost(amended)
    apply(amended, who, roles)
    code = see_through(amended.run, timeout_s, as_json=asked.as_json, no_wait=asked.no_wait)
    if not asked.as_json and code == 0:
        data(amended.new.url)
    return code


def shown(found: Difference) -> list[str]:
    """One line for each seat: + added, - removed, which becomes which, ~ replaced and why."""
    taken = found.taken
    lines = [f"+ {seat}" for seat in found.added if seat not in taken]
    lines += [f"- {seat}" for seat in found.removed if seat not in taken.values()]
    lines += found.handed_over
    return lines + [f"~ {seat}: {', '.join(why)}" for seat, why in (found.changed or {}).items()]
