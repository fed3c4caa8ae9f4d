"""`dynctl plan`: what would be started, and nothing is."""

from __future__ import annotations

import sys

from dynctl.cli import options
from dynctl.cli.plan_view import plan_text
from dynctl.cli.render import data, json_data, prose
from dynctl.deploy.plan import RunContext, build_plan
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe
from dynctl.topology.inventory import inventory_for

PREVIEW = RunContext(run_id="RUN_ID", run_dir="RUN_DIR", python=sys.executable)
"""Stands for what `up` chooses, so that the same recipe always gives the same plan."""


def plan(
    recipe: options.Recipe,
    inventory: options.Inventory = None,
    set_: options.Set = None,
    unset: options.Unset = None,
    json_: options.Json = False,
) -> None:
    """Show nodes, GPUs, ports and every command, start nothing.

    Places roles on the hosts of --inventory, else of the recipe, else on this machine. Secrets are masked.
    RUN_ID and RUN_DIR stand for what `dynctl up` chooses; it also goes round ports that are taken.
    """
    loaded = load_recipe(recipe, set_ or (), unset or ())
    warnings = check_recipe(loaded)
    made = build_plan(loaded, inventory_for(loaded.recipe, loaded.file, inventory), (), PREVIEW)
    for warning in warnings:
        prose(str(warning), style="warning")
    if json_:
        json_data(made.shown())
    else:
        data(plan_text(made))
