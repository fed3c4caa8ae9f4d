"""How large a deployment's job is: its parts, and the nodes and GPUs of each. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from dynctl.deploy.planner import needs
from dynctl.engines import catalog
from dynctl.errors import PlacementError
from dynctl.protocol.instances import Role
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.slurm import Slurm, SlurmPart
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.placement import Need, place

MOST_GPUS = 8
"""On a node, when neither the recipe nor its roles tell how many there are."""
_GRES_GPUS = re.compile(r"(?:^|,)(?:gres[:/])?gpu(?::[A-Za-z_][\w.-]*)?(?::(\d+))?(?=,|$)")


@dataclass(frozen=True, slots=True)
class Size:
    """What a job asks for: so many nodes, with so many GPUs on each."""

    nodes: int
    gpus: int


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a job: whose nodes they are (None = of all roles), how many, and what they are to be."""

    role: Role | None
    size: Size
    options: SlurmPart


def parts_of(loaded: LoadedRecipe) -> tuple[Part, ...]:
    """One part, or with `slurm.het` one for each role; in the order in which Slurm numbers them.

    Raises PlacementError when the roles do not fit on what the recipe says.
    """
    options = loaded.recipe.slurm or Slurm()
    wanted = _needs(loaded)
    whole = SlurmPart(**{name: getattr(options, name) for name in SlurmPart.model_fields})
    if options.het is None:
        return (Part(None, _with_spares(_size(loaded, wanted, whole), options), whole),)
    parts = []
    for role in loaded.recipe.roles.present():
        own = options.het.part(role)
        given = {name: getattr(own, name) for name in own.model_fields_set}
        merged = whole.model_copy(update=given)
        mine = [need for need in wanted if need.role == role]
        parts.append(Part(role, _with_spares(_size(loaded, mine, merged), options), merged))
    return tuple(parts)


def _with_spares(size: Size, options: Slurm) -> Size:
    return Size(size.nodes + options.spares, size.gpus)


def size_of(loaded: LoadedRecipe) -> Size:
    """All nodes of the job together, and the most GPUs that one has."""
    sizes = [part.size for part in parts_of(loaded)]
    return Size(sum(size.nodes for size in sizes), max(size.gpus for size in sizes))


def assumed(loaded: LoadedRecipe) -> Inventory:
    """The nodes as they will be, before Slurm has chosen them. Raises PlacementError."""
    hosts: list[Host] = []
    parts = parts_of(loaded)
    for part in parts:
        labels = (part.role,) if part.role is not None else ()
        start = len(hosts)
        names = [f"node-{start + i}" for i in range(part.size.nodes)]
        hosts += [Host(name, name, part.size.gpus, labels=labels) for name in names]
    told = " and ".join(f"{p.size.nodes} nodes with {p.size.gpus} GPUs each" for p in parts)
    return Inventory(tuple(hosts), f"a job of {told}")


def labelled(loaded: LoadedRecipe, inventory: Inventory, groups: Mapping[str, int]) -> Inventory:
    """The hosts with the role of their part as a label; `groups` is host → number of its part."""
    if loaded.recipe.slurm is None or loaded.recipe.slurm.het is None:
        return inventory
    roles = list(loaded.recipe.roles.present())
    hosts = (replace(host, labels=(roles[groups.get(host.name, 0)],)) for host in inventory.hosts)
    return replace(inventory, hosts=tuple(hosts))


def without_spares(loaded: LoadedRecipe, inventory: Inventory) -> Inventory:
    """The hosts that are used from the start: all but the last ones of each part."""
    spares = loaded.recipe.slurm.spares if loaded.recipe.slurm is not None else 0
    if not spares:
        return inventory
    parts: dict[tuple[str, ...], list[Host]] = {}
    for host in inventory.hosts:
        parts.setdefault(host.labels, []).append(host)
    used = {host.name for hosts in parts.values() for host in hosts[: max(1, len(hosts) - spares)]}
    return replace(inventory, hosts=tuple(host for host in inventory.hosts if host.name in used))


def on_its_parts(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with each role on the hosts that bear its label, when the job has a part for each."""
    recipe = loaded.recipe
    if recipe.slurm is None or recipe.slurm.het is None:
        return loaded
    update: dict[str, Any] = {
        role: section.model_copy(update={"hosts": [role]}) for role, section in recipe.roles.present().items()
    }
    return replace(loaded, recipe=recipe.model_copy(update={"roles": recipe.roles.model_copy(update=update)}))


def _needs(loaded: LoadedRecipe) -> list[Need]:
    """What is to be placed, wherever."""
    sections: dict[str, Any] = {
        role: s.model_copy(update={"hosts": []}) for role, s in loaded.recipe.roles.present().items()
    }
    recipe = loaded.recipe.model_copy(update={"roles": loaded.recipe.roles.model_copy(update=sections)})
    return needs(recipe, catalog.get(recipe.backend), _nodes(Size(1, 0)))


def _size(loaded: LoadedRecipe, wanted: Sequence[Need], options: SlurmPart) -> Size:
    total = sum(need.replicas * need.parallel.gpus for need in wanted if need.gpus)
    gpus = options.gpus_per_node if options.gpus_per_node is not None else _gres_gpus(options.gres)
    if gpus is None:
        gpus = min(ceil(total / (options.nodes or 1)), MOST_GPUS)
    if options.nodes is not None:
        _try(loaded, wanted, Size(options.nodes, gpus))
        return Size(options.nodes, gpus)
    least = max(1, ceil(total / gpus) if gpus else 1)
    most = max(least, total)
    for nodes in range(least, most):
        try:
            _try(loaded, wanted, Size(nodes, gpus))
        except PlacementError:
            continue
        return Size(nodes, gpus)
    _try(loaded, wanted, Size(most, gpus))
    return Size(most, gpus)


def _nodes(size: Size) -> Inventory:
    hosts = tuple(Host(f"node-{i}", f"node-{i}", size.gpus) for i in range(size.nodes))
    return Inventory(hosts, f"a job of {size.nodes} nodes with {size.gpus} GPUs each")


def _try(loaded: LoadedRecipe, wanted: Sequence[Need], size: Size) -> None:
    try:
        place(wanted, _nodes(size))
    except PlacementError as error:
        hint = "more slurm.nodes or slurm.gpus_per_node, fewer replicas, or smaller parallel sizes"
        raise PlacementError(error.message, where=loaded.where(error.where), hint=hint) from error


def _gres_gpus(gres: str) -> int | None:
    counts = [int(found[1] or 1) for found in _GRES_GPUS.finditer(gres)]
    return sum(counts) if counts else None
