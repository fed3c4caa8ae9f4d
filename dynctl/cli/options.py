"""Options that several verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def duration(text: str) -> float:
    """Seconds of "90", "90s", "5m" or "1h30m", as recipes have them. Raises BadParameter."""
    # Read when a duration is given: its rules are the recipe's, which no verb loads only to show its help.
    from dynctl.recipe.units import parse_duration

    try:
        return parse_duration(_number(text))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file (YAML).", show_default=False)]
MaybeRecipe = Annotated[
    Path | None,
    typer.Argument(metavar="[RECIPE]", help="The recipe file (YAML).", show_default=False),
]
Name = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]", help="The deployment; default: the only one running.", show_default=False
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="The deployment; default: the only one running.", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on standard output.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=V", help="Set a recipe field, again for more.", show_default=False),
]
Unset = Annotated[
    list[str] | None,
    typer.Option("--unset", metavar="A.B", help="Remove a recipe field, again for more.", show_default=False),
]
Inventory = Annotated[
    Path | None,
    typer.Option(
        "--inventory",
        metavar="FILE",
        help="Hosts and GPUs (YAML); default: this machine.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="TARGET",
        help="local, ssh or slurm, instead of the recipe's target.",
        show_default=False,
    ),
]


def with_target(sets: list[str] | None, target: str | None) -> list[str]:
    """The `--set` assignments, and that of --target."""
    return [*(sets or []), *([f"target={target}"] if target is not None else [])]
