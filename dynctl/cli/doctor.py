"""`dynctl doctor`: what is wrong with the hosts before anything is started on them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
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
from dynctl.deploy.plan import build_plan
from dynctl.doctor.checks import CHECKS, LOGIN, PLACEMENT, REACH
from dynctl.doctor.findings import ALL_HOSTS, Finding, counts
from dynctl.doctor.runners import LocalRunner, runner_for
from dynctl.doctor.service import Report, Way, cannot_be_asked, examine, examine_slurm, try_shared
from dynctl.doctor.subject import Wanted
from dynctl.errors import PlacementError, PortInUse
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import LOCAL, Host, Inventory, inventory_for, load_inventory

THIS = Host(LOCAL, "127.0.0.1")

Shared = Annotated[
    str | None,
    typer.Option(
        "--shared",
        metavar="DIR",
        help="See whether a file written there on the first host is seen on all.",
        show_default=False,
    ),
]


def doctor(
    recipe: options.MaybeRecipe = None,
    inventory: options.Inventory = None,
    shared: Shared = None,
    set_: options.Set = None,
    unset: options.Unset = None,
    as_json: options.Json = False,
) -> int:
    """Check each host before a start: what is wrong, and what would help. Starts nothing.

    With a recipe, what it needs of each host; without, this machine or the hosts of --inventory in general.
    What cannot be checked is shown with a question mark: it is not passed. Exit code 0: nothing is wrong,
    8: a host could not be reached, 7: only a port is taken, 4: anything else.
    """
    loaded = load_recipe(recipe, set_ or (), unset or (), files_here=False) if recipe else None
    if loaded:
        check_recipe(loaded)
    hosts, wanted, found = want(loaded, inventory)
    if sys.stderr.isatty():
        slow = "; an engine may take a minute to print its help" if loaded else ""
        prose(f"asking {len(hosts)} host{'s' if len(hosts) > 1 else ''} ...{slow}", style="dim")
    report = asyncio.run(look(hosts, wanted, shared or ""))
    report = Report((*found, *report.findings), report.facts)
    if as_json:
        json_data(as_object(report, loaded))
    else:
        data(report_text(report, hosts))
    return exit_code(report.findings)


def want(loaded: LoadedRecipe | None, inventory: Path | None) -> tuple[Sequence[Host], Wanted, list[Finding]]:
    """Which hosts to ask, what for, and what is wrong before any is asked."""
    version, home = metadata.version("dynctl"), run_home()
    if loaded is None:
        hosts = load_inventory(inventory).hosts if inventory else (THIS,)
        return hosts, Wanted(version, home, here=hosts == (THIS,)), []
    if behind_slurm(loaded, inventory):
        return (THIS,), Wanted(version, home, loaded), []
    there = inventory_for(loaded.recipe, loaded.file, inventory)
    here = [host.name for host in there.hosts] == [LOCAL]
    plan, found = None, []
    try:
        plan = build_plan(loaded, there, (), PREVIEW)
    except (PlacementError, PortInUse) as error:
        found = [Finding(ALL_HOSTS, PLACEMENT, "fail", error.message, f"{error.hint} ({error.where})")]
    hosts = used(there, [node.name for node in plan.nodes] if plan else [])
    return hosts, Wanted(version, home, loaded, plan, here=here), found


def behind_slurm(loaded: LoadedRecipe, inventory: Path | None) -> bool:
    """Whether the hosts are still to be chosen by Slurm: this machine is not one of them."""
    return loaded.recipe.target == "slurm" and inventory is None and not loaded.recipe.hosts


def used(inventory: Inventory, names: Sequence[str]) -> tuple[Host, ...]:
    """The hosts of the plan, all when there is none: why it does not fit may show on any."""
    return tuple(host for host in inventory.hosts if host.name in names or not names)


def run_home() -> str:
    """The directory of runs, by the name it has on all hosts."""
    return str(Home.find(os.environ).root) if os.environ.get("DYNCTL_HOME") else "~/.dynctl"


async def look(hosts: Sequence[Host], wanted: Wanted, shared: str) -> Report:
    """Ask the hosts and, for a recipe that names it, Slurm."""
    recipe = wanted.recipe
    runner = runner_for(hosts)
    behind = recipe is not None and recipe.target == "slurm" and wanted.plan is None and wanted.here
    topics = LOGIN if behind else CHECKS
    if runner is None:
        target = recipe.target if recipe else "ssh"
        why = f"dynctl has no way to hosts of target {target} yet"
        report = Report(tuple(cannot_be_asked(hosts, why)))
    else:
        python = sys.executable if isinstance(runner, LocalRunner) else "python3"
        way = Way(runner, python, sys.executable)
        report = await examine(hosts, wanted, way, topics)
        if shared:
            tried = await try_shared(shared, hosts, way)
            report = Report((*report.findings, *tried), report.facts)
    if recipe is not None and recipe.slurm is not None and recipe.target == "slurm":
        said = await examine_slurm(recipe.slurm, LocalRunner(), THIS)
        report = Report((*report.findings, *said), report.facts)
    return report


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
