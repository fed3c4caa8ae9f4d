"""An inventory as somebody wrote it: read from a file or a recipe, or found on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import Field

from dynctl.recipe import hosts as written
from dynctl.recipe.problems import Problem, as_error
from dynctl.recipe.schema import Recipe
from dynctl.recipe.section import Section
from dynctl.recipe.source import Document, read_document
from dynctl.recipe.validate import validate, where_of
from dynctl.topology.inventory import LOCAL, Host, Inventory, Ssh

_PROBE_TIMEOUT_S = 10.0


class _InventoryFile(Section):
    hosts: list[written.Host] = Field(min_length=1)
    """Machines, in the order they are filled."""
    defaults: written.HostDefaults = Field(default_factory=written.HostDefaults)
    """What holds for all hosts that do not say otherwise."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """Names for several hosts: host names, or patterns such as n*."""


def load_inventory(path: Path) -> Inventory:
    """Read a file of `hosts`, `defaults` and `groups`. Raises RecipeError that tells all faults by line."""
    document = read_document(path)
    made = validate(_InventoryFile, document)
    if isinstance(made, list):
        raise as_error(made, str(path))
    problems = [*_twins(made, document), *_group_problems(made, document)]
    if problems:
        raise as_error(problems, str(path))
    common = {name: getattr(made.defaults, name) for name in made.defaults.model_fields_set}
    hosts = [
        host.model_copy(update={k: v for k, v in common.items() if k not in host.model_fields_set})
        for host in made.hosts
    ]
    groups = {name: tuple(_members(made, patterns)) for name, patterns in made.groups.items()}
    return replace(from_hosts(hosts, str(path)), groups=groups)


def _twins(made: _InventoryFile, document: Document) -> Iterator[Problem]:
    for attribute in ("name", "address"):
        values = [getattr(host, attribute) or host.name for host in made.hosts]
        for i, value in enumerate(values):
            if value in values[:i]:
                where = where_of(document.wheres, ("hosts", i, attribute))
                yield Problem(where, f"two hosts have the {attribute} '{value}'")


def _group_problems(made: _InventoryFile, document: Document) -> Iterator[Problem]:
    names = [host.name for host in made.hosts]
    for group, patterns in made.groups.items():
        if group in names:
            yield Problem(where_of(document.wheres, ("groups", group)), f"'{group}' is a host and a group")
        for i, pattern in enumerate(patterns):
            if not any(fnmatchcase(name, pattern) for name in names):
                where = where_of(document.wheres, ("groups", group, i))
                yield Problem(where, f"no host is '{pattern}'", f"there are {', '.join(names)}")


def _members(made: _InventoryFile, patterns: Sequence[str]) -> list[str]:
    names = [host.name for host in made.hosts]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def from_hosts(hosts: Sequence[written.Host], source: str) -> Inventory:
    """The inventory a recipe's or inventory file's `hosts` make; at least one.

    A key file is looked for beside the file `source`, when its path is not absolute.
    """
    return Inventory(tuple(_host(h, Path(source).parent) for h in hosts), source)


def _host(given: written.Host, folder: Path) -> Host:
    key = os.path.abspath(folder / Path(given.key).expanduser()) if given.key else ""
    return Host(
        name=given.name,
        address=given.address or given.name,
        gpus=0 if given.gpus == "auto" else given.gpus,
        discover=given.gpus == "auto",
        labels=tuple(given.labels),
        ssh=Ssh(given.host or given.name, given.user, given.port, key, given.proxy_jump),
        python=given.python,
        directory=given.directory,
    )


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


def inventory_for(recipe: Recipe, recipe_file: str, file: Path | None) -> Inventory:
    """The machines to place on: those of `file`, else of the recipe's `hosts`, else this one."""
    if file is not None:
        return load_inventory(file)
    return from_hosts(recipe.hosts, recipe_file) if recipe.hosts else discover_local()
