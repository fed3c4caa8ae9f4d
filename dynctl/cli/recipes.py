"""`dynctl recipes`: what comes with dynctl."""

from __future__ import annotations

from dynctl.cli import options
from dynctl.cli.render import data, json_data, prose, table
from dynctl.recipe.shipped import shipped_recipes, shipped_scripts
from dynctl.recipe.source import read_document


def recipes(json_: options.Json = False) -> None:
    """The recipes that come with dynctl.

    Each can be named as shown by every verb that takes a recipe: dynctl up quickstart. Standard error tells
    where the sbatch scripts are.
    """
    rows = []
    for path in shipped_recipes():
        written = read_document(path).data
        told = {key: str(written.get(key, "")) for key in ("name", "backend", "description")}
        rows.append({"recipe": f"recipes/{path.name}", **told, "path": str(path)})
    if json_:
        json_data(rows)
    else:
        data(
            table(
                ("RECIPE", "BACKEND", "WHAT IT IS"),
                [[r["recipe"], r["backend"], r["description"]] for r in rows],
            )
        )
        for script in shipped_scripts():
            prose(f"for Slurm: sbatch {script} RECIPE")
