"""`dynctl doctor`: what is wrong with the hosts before anything is started on them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.doctor_view import report_text
from dynctl.cli.exits import UNFIT_FOR, UNFIT_HOST
from dynctl.cli.plan import PREVIEW
from dynctl.cli.render import data, json_data, prose
from dynctl.deploy.home import Home
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.slurm_size import kinds_of
from dynctl.doctor.checks import CHECKS, LOGIN, PLACEMENT, REACH
from dynctl.doctor.findings import ALL_HOSTS, Finding, counts
from dynctl.doctor.runners import LocalRunner, is_here, way_to
from dynctl.doctor.service import Report, Way, cannot_be_asked, examine, examine_slurm, gpus_of, try_shared
from dynctl.doctor.subject import Wanted
from dynctl.errors import PlacementError, PortInUse, UsageError
from dynctl.launchers.wheel import own_wheel
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.schema import Slurm
from dynctl.topology.inventory import LOCAL, Host, Inventory, with_gpus
from dynctl.topology.inventory_file import inventory_for, load_inventory

HERE = Inventory((Host(LOCAL, "127.0.0.1"),), "this machine")

Shared = Annotated[
    str | None,
    typer.Option(
        "--shared",
        metavar="DIR",
        help="See whether a file written there on the first host is seen on all.",
        show_default=False,
    ),
]
OnNodes = Annotated[
    bool, typer.Option("--on-nodes", help="On Slurm: look at nodes as the job would get them, by srun.")
]
Within = Annotated[
    float,
    typer.Option(
        "--within", metavar="TIME", parser=options.duration, help="With --on-nodes: for Slurm to give them."
    ),
]


def doctor(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.MaybeRecipe = None,
    inventory: options.Inventory = None,
    shared: Shared = None,
    target: options.Target = None,
    on_nodes: OnNodes = False,
    within: Within = 60.0,
    set_: options.Set = None,
    unset: options.Unset = None,
    as_json: options.Json = False,
) -> int:
    """Check each host before a start: what is wrong, and what would help. Starts nothing.

    With a recipe, what it needs of each host; without, this machine or the hosts of --inventory in general.
    What cannot be checked is shown with a question mark: it is not passed. Exit code 0: nothing is wrong,
    8: a host could not be reached, 7: only a port is taken, 4: anything else.
    """
    sets = options.with_target(set_, target)
    loaded = load_recipe(recipe, sets, unset or (), files_here=False) if recipe else None
    if loaded:
        check_recipe(loaded)
    if on_nodes:
        # Like SSH not loaded where it is not used.
        from dynctl.cli.doctor_nodes import look_at_nodes, on_slurm

        if shared or inventory:
            raise UsageError("with --on-nodes Slurm chooses the hosts", hint="no --shared, no --inventory")
        return told(*asyncio.run(look_at_nodes(on_slurm(loaded), within)), loaded, as_json=as_json)
    there = machines(loaded, inventory)
    if sys.stderr.isatty():
        count = len(there.hosts)
        slow = "; an engine may take a minute to print its help" if loaded else ""
        prose(f"asking {count} host{'s' if count > 1 else ''} ...{slow}", style="dim")
    return told(*asyncio.run(look(loaded, there, shared or "")), loaded, as_json=as_json)


def told(hosts: Sequence[Host], report: Report, loaded: LoadedRecipe | None, *, as_json: bool) -> int:
    """Say what was found; the exit code."""
    if as_json:
        json_data(as_object(report, loaded))
    else:
        data(report_text(report, hosts))
    return exit_code(report.findings)


def machines(loaded: LoadedRecipe | None, inventory: Path | None) -> Inventory:
    """The hosts to ask; this machine for a recipe whose hosts are still to be chosen by Slurm."""
    if loaded is None:
        return load_inventory(inventory) if inventory else HERE
    if loaded.recipe.target == "slurm" and inventory is None and not loaded.recipe.hosts:
        return HERE
    return inventory_for(loaded.recipe, loaded.file, inventory)


async def look(loaded: LoadedRecipe | None, there: Inventory, shared: str) -> tuple[Sequence[Host], Report]:
    """Ask the hosts and, for a recipe that names it, Slurm: who was asked, and what was found."""
    target = loaded.recipe.target if loaded else "ssh"
    async with way_to(there.hosts, target) as runner:
        if runner is None:
            hosts, wanted, found = want(loaded, there)
            why = f"dynctl has no way to hosts of target {target} yet"
            found += cannot_be_asked(hosts, why)
            return hosts, Report((*found, *await slurm_says(wanted)))
        if is_here(there.hosts):
            way = Way(runner, sys.executable, (sys.executable,))
        else:
            # Like SSH itself not loaded where it is not used.
            from dynctl.launchers.bootstrap import environment_of

            made = await asyncio.to_thread(own_wheel)
            way = Way(runner, dynctl_pythons=(f"~/{environment_of(made)}/bin/python",))
        there = with_gpus(there, await gpus_of(there.hosts, way))
        hosts, wanted, found = want(loaded, there)
        report = await examine(hosts, wanted, way, LOGIN if is_behind(wanted) else CHECKS)
        found += report.findings
        if shared:
            found += await try_shared(shared, hosts, way)
        return hosts, Report((*found, *await slurm_says(wanted)), report.facts)


def want(loaded: LoadedRecipe | None, there: Inventory) -> tuple[Sequence[Host], Wanted, list[Finding]]:
    """Which hosts to ask, what for, and what is wrong before any is asked."""
    wanted = Wanted(metadata.version("dynctl"), run_home(), loaded, here=is_here(there.hosts))
    if loaded is None:
        return there.hosts, wanted, []
    if is_behind(wanted):
        granted = granted_by(loaded.recipe.slurm)
        return there.hosts, wanted, placed(loaded, granted)[1] if granted else []
    if silent := there.undiscovered():
        told = f"not placed: how many GPUs there are was not told by {' and '.join(silent)}"
        return there.hosts, wanted, [Finding(ALL_HOSTS, PLACEMENT, "unknown", told)]
    plan, found = placed(loaded, there)
    return there.hosts, replace(wanted, plan=plan), found


def is_behind(wanted: Wanted) -> bool:
    """Whether this machine is asked for what the nodes behind it share with it."""
    return wanted.recipe is not None and wanted.recipe.target == "slurm" and wanted.here


async def slurm_says(wanted: Wanted) -> list[Finding]:
    """What Slurm tells of a recipe that is to run there; [] for others."""
    recipe = wanted.recipe
    if recipe is None or recipe.target != "slurm":
        return []
    options = recipe.slurm or Slurm()
    kinds = kinds_of(wanted.loaded) if wanted.loaded is not None else ()
    parts: dict[str, Slurm] = {role or "": options.model_copy(update=dict(part)) for role, part in kinds}
    return await examine_slurm(parts, LocalRunner(), HERE.hosts[0])


def placed(loaded: LoadedRecipe, there: Inventory) -> tuple[Plan | None, list[Finding]]:
    """The plan on these hosts, or None and why there is none."""
    try:
        return build_plan(loaded, there, (), PREVIEW), []
    except (PlacementError, PortInUse) as error:
        return None, [unplaced(error)]


def unplaced(error: PlacementError | PortInUse) -> Finding:
    """That the recipe does not fit."""
    return Finding(ALL_HOSTS, PLACEMENT, "fail", error.message, f"{error.hint} ({error.where})")


def granted_by(slurm: Slurm | None) -> Inventory | None:
    """The nodes that a job will get, by made-up names; None when the recipe does not say what they are."""
    if slurm is None or not slurm.nodes or slurm.gpus_per_node is None:
        return None
    nodes = tuple(Host(f"node-{i}", f"node-{i}", slurm.gpus_per_node) for i in range(slurm.nodes))
    return Inventory(nodes, f"slurm.nodes {slurm.nodes} x gpus_per_node {slurm.gpus_per_node}")


def run_home() -> str:
    """The directory of runs, by the name it has on all hosts."""
    return str(Home.find(os.environ).root) if os.environ.get("DYNCTL_HOME") else "~/.dynctl"


def as_object(report: Report, loaded: LoadedRecipe | None) -> dict[str, Any]:
    """The report for scripts, with all that the hosts told."""
    found = counts(report.findings)
    return {
        "name": loaded.recipe.name if loaded else "",
        "ok": not found["fail"],
        "counts": found,
        "findings": [msgspec.to_builtins(finding) for finding in report.findings],
        "facts": {host: msgspec.to_builtins(facts) for host, facts in report.facts.items()},
    }


def exit_code(findings: Sequence[Finding]) -> int:
    """0 when nothing fails, else the code of what does (`cli.exits`)."""
    failed = {finding.check for finding in findings if finding.level == "fail"}
    if not failed:
        return 0
    if REACH in failed:
        return UNFIT_FOR[REACH]
    return UNFIT_FOR.get(next(iter(failed)), UNFIT_HOST) if len(failed) == 1 else UNFIT_HOST
