"""Which machines there are and how many GPUs each has: from a file, from the recipe, or this machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dynctl.recipe import schema
from dynctl.recipe.problems import Problem, as_error
from dynctl.recipe.source import read_document
from dynctl.recipe.validate import validate, where_of

_PROBE_TIMEOUT_S = 10.0
LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Host:
    """One machine: its address on the data network, and GPUs 0 .. gpus - 1."""

    name: str
    address: str
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    """Machines in the order they are filled; never empty. `source` tells people where this is from."""

    hosts: tuple[Host, ...]
    source: str


class _InventoryFile(schema.Section):
    hosts: list[schema.Host] = Field(min_length=1)
    """Machines, in the order they are filled."""


def load_inventory(path: Path) -> Inventory:
    """Read `{hosts: [{name, address, gpus}]}`. Raises RecipeError that tells all faults with their lines."""
    document = read_document(path)
    made = validate(_InventoryFile, document)
    if isinstance(made, list):
        raise as_error(made, str(path))
    problems = []
    for attribute in ("name", "address"):
        values = [getattr(host, attribute) or host.name for host in made.hosts]
        for i, value in enumerate(values):
            if value in values[:i]:
                where = where_of(document.wheres, ("hosts", i, attribute))
                problems.append(Problem(where, f"two hosts have the {attribute} '{value}'"))
    if problems:
        raise as_error(problems, str(path))
    return from_hosts(made.hosts, str(path))


def from_hosts(hosts: Sequence[schema.Host], source: str) -> Inventory:
    """The inventory a recipe's or inventory file's `hosts` make; at least one."""
    return Inventory(tuple(Host(h.name, h.address or h.name, h.gpus) for h in hosts), source)


def discover_local() -> Inventory:
    """This machine under the loopback address, with the GPUs that nvidia-smi lists (none without it)."""
    return Inventory((Host(LOCAL, "127.0.0.1", _local_gpus()),), "this machine")


def _local_gpus() -> int:
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        done = subprocess.run(
            [program, "--list-gpus"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0  # an installed but broken driver: the same as no GPU, said so by the placement error
    if done.returncode != 0:
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def inventory_for(recipe: schema.Recipe, recipe_file: str, file: Path | None) -> Inventory:
    """The machines to place on: those of `file`, else of the recipe's `hosts`, else this one."""
    if file is not None:
        return load_inventory(file)
    return from_hosts(recipe.hosts, recipe_file) if recipe.hosts else discover_local()
