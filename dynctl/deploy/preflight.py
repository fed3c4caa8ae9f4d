"""What must be true on this machine before anything of a plan is started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from dynctl.deploy.plan import Plan
from dynctl.errors import RecipeError
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import LOCAL, Inventory


def require_local(loaded: LoadedRecipe, inventory: Inventory) -> None:
    """Refuse what cannot be started yet: other targets, other machines. Raises RecipeError."""
    target = loaded.recipe.target
    if target != "local":
        raise RecipeError(
            f"target {target} cannot be started yet, only planned",
            where=loaded.where("target"),
            hint="--set target=local runs it on this machine",
        )
    if [host.name for host in inventory.hosts] != [LOCAL]:
        raise RecipeError(
            f"target local runs on this machine only, {inventory.source} names other hosts",
            where=loaded.where("hosts"),
            hint="leave out hosts and --inventory",
        )


def require_programs(plan: Plan, loaded: LoadedRecipe, environ: Mapping[str, str]) -> None:
    """Every engine's program is there and may be run. Raises RecipeError that says where was looked.

    Only for target local: other machines are not looked at.
    """
    if plan.target != "local":
        return
    for process in plan.processes:
        if process.kind != "engine":
            continue
        program = process.command.argv[0]
        path = process.command.env.get("PATH") or environ.get("PATH") or os.defpath
        if shutil.which(program, path=path) is None:
            raise _missing(program, path, loaded)


def _missing(program: str, path: str, loaded: LoadedRecipe) -> RecipeError:
    engine = loaded.recipe.engine
    given = next((name for name in ("container", "python", "venv") if getattr(engine, name)), "")
    where = loaded.where(f"engine.{given}" if given else "backend")
    if os.path.isabs(program):
        message = f"engine program missing: {program} is not there or may not be run"
    else:
        message = f"engine program missing: '{program}' is not on PATH ({path})"
    hint = f"correct engine.{given}" if given else "set engine.venv, engine.python or engine.container"
    return RecipeError(message, where=where, hint=hint)
