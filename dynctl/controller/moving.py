"""Where the workers of a lost node go: worked out from what the run keeps on disk."""

from __future__ import annotations

from collections.abc import Collection

from dynctl.deploy.amend import hosts_of
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.rehome import rehome
from dynctl.deploy.slurm_size import on_its_parts
from dynctl.deploy.slurm_up import staged_recipe
from dynctl.recipe.load import load_recipe


def elsewhere(run: RunDir, plan: Plan, lost: Collection[str]) -> Plan:
    """The plan without the lost nodes' workers on them. Raises PlacementError when there is no room,
    RecipeError, CodecError for a run that cannot be read. Reads files: not for the event loop.
    """
    loaded = load_recipe(run.lock, (), (), files_here=False)
    if loaded.recipe.target == "slurm":
        loaded = on_its_parts(staged_recipe(loaded))
    return rehome(loaded, hosts_of(run, plan), plan, (), lost)
