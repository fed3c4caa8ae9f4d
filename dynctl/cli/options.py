"""Options that several verbs share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe file (YAML).", show_default=False)]
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
