"""`dynctl plan`: what would be started, and nothing is."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.pick import home
from dynctl.cli.plan_view import plan_text
from dynctl.cli.render import data, json_data, prose
from dynctl.deploy.planner import build_plan
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_script import JobContext, script_text
from dynctl.deploy.slurm_size import assumed, on_its_parts
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe
from dynctl.topology.inventory_file import inventory_for

Sbatch = Annotated[bool, typer.Option("--sbatch", help="Print the batch script of target slurm.")]
PREVIEW = RunContext(run_id="RUN_ID", run_dir="RUN_DIR", python=sys.executable)
"""Stands for what `up` chooses, so that the same recipe always gives the same plan."""


def plan(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.Recipe,
    inventory: options.Inventory = None,
    target: options.Target = None,
    sbatch: Sbatch = False,
    set_: options.Set = None,
    unset: options.Unset = None,
    json_: options.Json = False,
) -> None:
    """Show nodes, GPUs, ports and every command, start nothing.

    Places roles on the hosts of --inventory, else of the recipe, else on this machine. Secrets are masked.
    RUN_ID and RUN_DIR stand for what `dynctl up` chooses; it also goes round ports that are taken. On Slurm,
    node-0 and so on stand for the nodes that the job will be given.
    """
    loaded = load_recipe(recipe, options.with_target(set_, target), unset or ())
    warnings = check_recipe(loaded)
    if sbatch:
        data(script_text(loaded, JobContext("RUN_ID", "RUN_DIR", sys.executable, str(home().root))).rstrip())
        return
    on_slurm = loaded.recipe.target == "slurm" and inventory is None
    there = assumed(loaded) if on_slurm else inventory_for(loaded.recipe, loaded.file, inventory)
    made = build_plan(on_its_parts(loaded) if on_slurm else loaded, there, (), PREVIEW)
    for warning in warnings:
        prose(str(warning), style="warning")
    if json_:
        json_data(made.shown())
    else:
        data(plan_text(made))
