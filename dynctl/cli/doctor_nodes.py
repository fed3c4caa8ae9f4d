"""`dynctl doctor RECIPE --on-nodes`: what is wrong with the nodes that Slurm would give its job."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from dynctl.cli.doctor import HERE, placed, run_home, slurm_says, unplaced
from dynctl.cli.render import prose
from dynctl.deploy.slurm_look import Limits
from dynctl.deploy.slurm_size import assumed, on_its_parts, parts_of, without_spares
from dynctl.doctor.checks import question
from dynctl.doctor.nodes import answers, look_at, nodes_of
from dynctl.doctor.service import ENGINE_S, PLAIN_S, Report, judged
from dynctl.doctor.subject import Wanted
from dynctl.errors import PlacementError, UsageError
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import Host


def on_slurm(loaded: LoadedRecipe | None) -> LoadedRecipe:
    """The recipe of which compute nodes are looked at. Raises UsageError for others."""
    if loaded is None or loaded.recipe.target != "slurm":
        raise UsageError(
            "--on-nodes looks at nodes that Slurm gives", hint="dynctl doctor RECIPE --target slurm"
        )
    return loaded


async def look_at_nodes(loaded: LoadedRecipe, within_s: float) -> tuple[Sequence[Host], Report]:
    """Ask nodes as the recipe's job would get them, and Slurm: who answered, and what was found."""
    try:
        parts = parts_of(loaded)
    except PlacementError as error:
        return (), Report((unplaced(error),))
    wanted = Wanted(metadata.version("dynctl"), run_home(), loaded, here=False)
    asked = question(HERE.hosts[0], wanted, (sys.executable,))
    limits = Limits(within_s, ENGINE_S if asked.engine else PLAIN_S)
    if sys.stderr.isatty():
        prose(f"asking Slurm for nodes, for {within_s:.0f} s at most ...", style="dim")
    seen = await asyncio.gather(*(look_at(loaded, part, asked, limits) for part in parts))
    there = nodes_of(parts, seen)
    if any(one.findings for one in seen):
        _, found = placed(loaded, assumed(loaded))
    else:
        plan, found = placed(on_its_parts(loaded), without_spares(loaded, there))
        wanted = replace(wanted, plan=plan)
    report = judged([answer for one in seen for answer in answers(one, there, wanted)])
    silent = [Host(name, name) for one in seen for name in one.silent]
    findings = (*found, *report.findings, *await slurm_says(wanted))
    return (*there.hosts, *silent), Report(findings, report.facts)
