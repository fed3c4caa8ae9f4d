"""`dynctl validate`: everything that can be known to be wrong without starting anything."""

from __future__ import annotations

import os

from dynctl.cli import options
from dynctl.cli.plan import PREVIEW
from dynctl.cli.render import data, json_data, prose
from dynctl.deploy.planner import build_plan
from dynctl.deploy.preflight import require_certificate, require_programs
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe
from dynctl.topology.inventory_file import inventory_for


def validate(
    recipe: options.Recipe,
    inventory: options.Inventory = None,
    set_: options.Set = None,
    unset: options.Unset = None,
    json_: options.Json = False,
) -> None:
    """Check a recipe, start nothing.

    Fields, what they mean together, the model's files, the engine's program (target local), and whether it
    fits the hosts, when they are known: from --inventory, the recipe, or this machine for target local.
    """
    loaded = load_recipe(recipe, set_ or (), unset or ())
    warnings = [str(warning) for warning in check_recipe(loaded)]
    placed = bool(inventory or loaded.recipe.hosts or loaded.recipe.target == "local")
    if placed:
        made = build_plan(loaded, inventory_for(loaded.recipe, loaded.file, inventory), (), PREVIEW)
        require_programs(made, loaded, os.environ)
        require_certificate(loaded)
    for warning in warnings:
        prose(warning, style="warning")
    if not placed:
        prose("placement not checked: no hosts known; give --inventory FILE")
    if json_:
        json_data({"valid": True, "name": loaded.recipe.name, "file": loaded.file, "warnings": warnings})
    else:
        data(f"{loaded.file}: valid")
