"""What must be true on this machine before anything of a plan is started."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from dynctl.deploy.plan import Plan
from dynctl.errors import LaunchError, RecipeError
from dynctl.http.certificate import fault
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import LOCAL, Inventory

_LONGEST_FIRST_LINE = 256
"""As long as Linux reads it."""


def require_startable(loaded: LoadedRecipe, inventory: Inventory) -> None:
    """Refuse what cannot be started: a target without its machines, local with others. Raises RecipeError."""
    target = loaded.recipe.target
    if target == "ssh":
        if [host.name for host in inventory.hosts] == [LOCAL]:
            raise RecipeError(
                "target ssh needs hosts",
                where=loaded.where("target"),
                hint="--inventory FILE, or `hosts` in the recipe: [{name: n1}, {name: n2}]",
            )
        return
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
        found = shutil.which(program, path=path)
        if found is None:
            raise _missing(program, path, loaded)
        interpreter = interpreter_of(found)
        if interpreter and not os.path.exists(interpreter):
            raise _dangling(found, interpreter, loaded)


def require_certificate(loaded: LoadedRecipe) -> None:
    """The frontend's certificate and key can be used, today. Raises RecipeError."""
    tls = loaded.recipe.frontend.tls
    if tls is None or loaded.recipe.target != "local":
        return
    where = loaded.where("frontend.tls.cert")
    try:
        doubt = fault(tls.cert, tls.key)
    except LaunchError as error:
        raise RecipeError(f"{error.message} ({error.where})", where=where, hint=error.hint) from error
    if doubt:
        raise RecipeError(f"no client will take the TLS certificate: {doubt} ({tls.cert})", where=where)


def interpreter_of(program: str) -> str:
    """What the first line of a script says runs it; "" for other programs and unreadable ones."""
    try:
        with open(program, "rb") as file:
            first = file.readline(_LONGEST_FIRST_LINE)
    except OSError:
        return ""  # it may be run without being read, and the kernel will say if it may not
    words = os.fsdecode(first[2:]).split(maxsplit=1) if first.startswith(b"#!") else []
    return words[0] if words and os.path.isabs(words[0]) else ""


def _dangling(program: str, interpreter: str, loaded: LoadedRecipe) -> RecipeError:
    field = _given_engine(loaded)
    return RecipeError(
        f"engine program cannot run: {program} is for {interpreter}, which is not there",
        where=loaded.where(f"engine.{field}" if field else "backend"),
        hint="a virtual environment that was moved must be made anew",
    )


def _given_engine(loaded: LoadedRecipe) -> str:
    engine = loaded.recipe.engine
    return next((name for name in ("container", "python", "venv") if getattr(engine, name)), "")


def _missing(program: str, path: str, loaded: LoadedRecipe) -> RecipeError:
    given = _given_engine(loaded)
    where = loaded.where(f"engine.{given}" if given else "backend")
    if os.path.isabs(program):
        message = f"engine program missing: {program} is not there or may not be run"
    else:
        message = f"engine program missing: '{program}' is not on PATH ({path})"
    hint = f"correct engine.{given}" if given else "set engine.venv, engine.python or engine.container"
    return RecipeError(message, where=where, hint=hint)
