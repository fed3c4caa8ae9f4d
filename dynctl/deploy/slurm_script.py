"""The batch script of a deployment: how large its job is, its directives, what starts it. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from dynctl.deploy.plan import needs
from dynctl.engines import catalog
from dynctl.errors import PlacementError, RecipeError
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe, SbatchValue, Slurm
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.placement import place

MOST_GPUS = 8
"""On a node, when neither the recipe nor its roles tell how many there are."""
DRAIN_SIGNAL = "USR1"
"""What the batch script is sent ahead of the time limit."""
_PLAIN = re.compile(r"[\w@%+=:,./\[\]&|*()-]*", re.ASCII)
_GRES_GPUS = re.compile(r"(?:^|,)(?:gres[:/])?gpu(?::[A-Za-z_][\w.-]*)?(?::(\d+))?(?=,|$)")
_OWNED = {
    "job-name": "nothing: jobs are found by it",
    "output": "nothing: it goes to the run directory",
    "error": "nothing: it goes to the run directory",
    "array": "nothing: a deployment is one job",
    "wrap": "nothing: dynctl writes the script",
    "parsable": "nothing: dynctl reads the answer",
    "ntasks": "slurm.nodes",
    "ntasks-per-node": "slurm.nodes",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "time": "slurm.time",
    "nodes": "slurm.nodes",
    "gpus-per-node": "slurm.gpus_per_node",
    "gres": "slurm.gres",
    "cpus-per-task": "slurm.cpus_per_task",
    "mem": "slurm.mem",
    "constraint": "slurm.constraint",
    "exclude": "slurm.exclude",
    "nodelist": "slurm.nodelist",
    "exclusive": "slurm.exclusive",
    "reservation": "slurm.reservation",
    "comment": "slurm.comment",
    "signal": "slurm.warning",
}
_LEAST_WARNING_S = 60.0
"""Slurm counts in minutes, and may warn so much earlier than asked."""


@dataclass(frozen=True, slots=True)
class Size:
    """What a job asks for: so many nodes, with so many GPUs on each."""

    nodes: int
    gpus: int


@dataclass(frozen=True, slots=True)
class JobContext:
    """What differs from job to job: its name, the run directory (absolute), the Python that has dynctl."""

    name: str
    run_dir: str
    python: str
    home: str


def size_of(loaded: LoadedRecipe) -> Size:
    """The nodes and GPUs that the roles need, as far as the recipe does not say itself.

    Raises PlacementError when they do not fit on what it says.
    """
    recipe = loaded.recipe
    options = recipe.slurm or Slurm()
    wanted = needs(recipe, catalog.get(recipe.backend), _nodes(Size(1, 0)))
    total = sum(need.replicas * need.parallel.gpus for need in wanted if need.gpus)
    gpus = options.gpus_per_node if options.gpus_per_node is not None else _gres_gpus(options.gres)
    if gpus is None:
        gpus = min(total, MOST_GPUS) if options.nodes is None else min(ceil(total / options.nodes), MOST_GPUS)
    if options.nodes is not None:
        _try(loaded, Size(options.nodes, gpus))
        return Size(options.nodes, gpus)
    least = max(1, ceil(total / gpus) if gpus else 1)
    most = max(least, total)
    for nodes in range(least, most):
        try:
            _try(loaded, Size(nodes, gpus))
        except PlacementError:
            continue
        return Size(nodes, gpus)
    _try(loaded, Size(most, gpus))
    return Size(most, gpus)


def assumed(loaded: LoadedRecipe) -> Inventory:
    """The nodes as they will be, before Slurm has chosen them. Raises PlacementError."""
    return _nodes(size_of(loaded))


def _nodes(size: Size) -> Inventory:
    hosts = tuple(Host(f"node-{i}", f"node-{i}", size.gpus) for i in range(size.nodes))
    return Inventory(hosts, f"a job of {size.nodes} nodes with {size.gpus} GPUs each")


def _try(loaded: LoadedRecipe, size: Size) -> None:
    try:
        there = _nodes(size)
        place(needs(loaded.recipe, catalog.get(loaded.recipe.backend), there), there)
    except PlacementError as error:
        hint = "more slurm.nodes or slurm.gpus_per_node, fewer replicas, or smaller parallel sizes"
        raise PlacementError(error.message, where=loaded.where(error.where), hint=hint) from error


def _gres_gpus(gres: str) -> int | None:
    counts = [int(found[1] or 1) for found in _GRES_GPUS.finditer(gres)]
    return sum(counts) if counts else None


def script_text(loaded: LoadedRecipe, context: JobContext) -> str:
    """The whole script. Raises PlacementError, RecipeError."""
    size = size_of(loaded)
    lines = ["#!/bin/bash", *(f"#SBATCH {line}" for line in directives(loaded, size, context))]
    run = shlex.quote(context.run_dir)
    return "\n".join(
        [
            *lines,
            f"export DYNCTL_HOME={shlex.quote(context.home)}",
            f"cd {run} || exit 1",
            f"exec {shlex.quote(context.python)} -u -m dynctl.controller.slurm_job --run-dir {run}",
            "",
        ]
    )


def directives(loaded: LoadedRecipe, size: Size, context: JobContext) -> list[str]:
    """What follows `#SBATCH ` on each line."""
    recipe = loaded.recipe
    options = recipe.slurm or Slurm()
    refuse_owned(loaded, options.sbatch_args)
    _refuse_short(loaded, options)
    given: dict[str, SbatchValue | int | None] = {
        "job-name": context.name,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "nodes": size.nodes,
        "ntasks-per-node": 1,
        "gres": options.gres,
        "gpus-per-node": size.gpus if size.gpus and not options.gres else None,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "time": slurm_time(options.time) if options.time is not None else None,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "nodelist": options.nodelist,
        "exclusive": options.exclusive,
        "reservation": options.reservation,
        "comment": options.comment,
        "output": f"{_no_pattern(context.run_dir)}/logs/controller.log",
        "open-mode": "append",
        "signal": _warning(options),
        "no-requeue": not {"requeue", "no-requeue"} & set(options.sbatch_args),
        **options.sbatch_args,
    }
    return [_directive(name, value) for name, value in given.items() if value not in (None, "", False)]


def refuse_owned(loaded: LoadedRecipe, given: Mapping[str, SbatchValue]) -> None:
    """Options that a field of the recipe sets, or that would hide the job. Raises RecipeError."""
    for name in given:
        owner = _OWNED.get(name)
        if owner is None:
            continue
        where = loaded.where(f"slurm.sbatch_args.{name}")
        if owner.startswith("nothing: "):
            raise RecipeError(f"'{name}' cannot be given: {owner.removeprefix('nothing: ')}", where=where)
        raise RecipeError(f"'{name}' is set by dynctl, from {owner}: set it there", where=where)


def _refuse_short(loaded: LoadedRecipe, options: Slurm) -> None:
    """A time limit that leaves no time to serve. Raises RecipeError."""
    least = options.warning + _LEAST_WARNING_S
    if options.time is None or options.time >= least:
        return
    told = f"a time limit of {options.time:g} s is too short: it drains {options.warning:g} s ahead"
    hint = f"at least {least:g} s, or a shorter slurm.warning"
    raise RecipeError(told, where=loaded.where("slurm.time"), hint=hint)


def slurm_time(seconds: float) -> str:
    """D-HH:MM:SS; Slurm rounds up to minutes."""
    whole = ceil(seconds)
    days, rest = divmod(whole, 86400)
    return f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _warning(options: Slurm) -> str | None:
    """Slurm sends it up to 60 s early. Without a time limit of ours it refers to the partition's."""
    return f"B:{DRAIN_SIGNAL}@{ceil(options.warning)}" if options.warning else None


def _directive(name: str, value: SbatchValue | int | None) -> str:
    """`--name=value` as sbatch reads it again: quotes and backslashes are its own, not the shell's."""
    if value is True:
        return f"--{name}"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"--{name}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'


def _no_pattern(path: str) -> str:
    """A path in which Slurm replaces nothing."""
    return path.replace("%", "%%")


def name_of(recipe: Recipe) -> str:
    """What stands for the job's name where none has been chosen yet."""
    return f"{recipe.name}-RUN_ID"
