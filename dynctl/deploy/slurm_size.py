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

MORE_NODES = "more slurm.nodes or slurm.gpus_per_node"
"""How a job has room for more."""
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
    parts = []
    for role, own in kinds_of(loaded):
        mine = [need for need in wanted if role is None or need.role == role]
        parts.append(Part(role, _with_spares(_size(loaded, mine, own), options), own))
    return tuple(parts)


def kinds_of(loaded: LoadedRecipe) -> tuple[tuple[Role | None, SlurmPart], ...]:
    """Of each part whose nodes they are (None = of all roles) and what they are to be, in Slurm's order."""
    options = loaded.recipe.slurm or Slurm()
    whole = SlurmPart(**{name: getattr(options, name) for name in SlurmPart.model_fields})
    if options.het is None:
        return ((None, whole),)
    kinds: list[tuple[Role | None, SlurmPart]] = []
    for role in loaded.recipe.roles.present():
        own = options.het.part(role)
        given = {name: getattr(own, name) for name in own.model_fields_set}
        kinds.append((role, whole.model_copy(update=given)))
    return tuple(kinds)


def _with_spares(size: Size, options: Slurm) -> Size:
    return Size(size.nodes + options.spares, size.gpus)


def gpus_of_kind(inventory: Inventory, role: str | None) -> int:
    """GPUs of a node of the part that is of this role (None: of all)."""
    return max((host.gpus for host in inventory.hosts if role is None or role in host.labels), default=0)


def widened(loaded: LoadedRecipe, inventory: Inventory) -> LoadedRecipe:
    """The recipe asking for as many nodes, each like those of `inventory`, as its roles need by now: more
    replicas than `slurm.nodes` has room for must have them when the job is submitted anew.

    Raises PlacementError when no number of nodes would do.
    """
    options, wanted = loaded.recipe.slurm or Slurm(), _needs(loaded)
    update: dict[str | None, dict[str, int]] = {}
    for role, own in kinds_of(loaded):
        gpus = gpus_of_kind(inventory, role)
        shape = {} if not gpus or own.gres or own.gpus_per_node is not None else {"gpus_per_node": gpus}
        mine = [need for need in wanted if role is None or need.role == role]
        least = _size(loaded, mine, own.model_copy(update={**shape, "nodes": None})).nodes
        update[role] = {**shape, "nodes": least} if own.nodes is not None and own.nodes < least else {}
        update[role] |= shape if own.nodes is None else {}
    if options.het is None:
        wide = options.model_copy(update=update[None])
    else:
        own_parts = {role: options.het.part(role) for role in loaded.recipe.roles.present()}
        parts: dict[str, Any] = {
            role: part.model_copy(update=update[role]) for role, part in own_parts.items()
        }
        wide = options.model_copy(update={"het": options.het.model_copy(update=parts)})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"slurm": wide}))


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
    return Inventory(tuple(hosts), f"a job of {told}", more=MORE_NODES)


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
    return Inventory(hosts, f"a job of {size.nodes} nodes with {size.gpus} GPUs each", more=MORE_NODES)


def _try(loaded: LoadedRecipe, wanted: Sequence[Need], size: Size) -> None:
    try:
        place(wanted, _nodes(size))
    except PlacementError as error:
        raise PlacementError(error.message, where=loaded.where(error.where), hint=error.hint) from error


def _gres_gpus(gres: str) -> int | None:
    counts = [int(found[1] or 1) for found in _GRES_GPUS.finditer(gres)]
    return sum(counts) if counts else None
