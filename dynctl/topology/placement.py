"""Which replica runs on which node and GPUs. Pure and deterministic.

Replicas are placed largest first, each whole on the node where the fewest GPUs stay free; one that fits no
node is cut into equal parts over as few nodes as will do, and a tensor-parallel group crosses nodes only when
it is larger than a node. A GPU belongs to one replica. Replicas without GPUs go round the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynctl.engines.base import Parallel, Rank
from dynctl.errors import PlacementError
from dynctl.topology.inventory import Host, Inventory


@dataclass(frozen=True, slots=True)
class Need:
    """Replicas of one role. `gpus` False: they need none. `multi_node` False: each must fit one node."""

    role: str
    replicas: int
    parallel: Parallel
    gpus: bool = True
    multi_node: bool = True


Placement = Mapping[tuple[str, int], tuple[Rank, ...]]
"""(role, index) → the replica's parts, the head first."""


def place(needs: Sequence[Need], inventory: Inventory) -> Placement:
    """A place for every replica. Raises PlacementError that names need and have, in total and per node."""
    free = {host.name: list(range(host.gpus)) for host in inventory.hosts}
    placed: dict[tuple[str, int], tuple[Rank, ...]] = {}
    wanted = [(need, index) for need in needs if need.gpus for index in range(need.replicas)]
    for need, index in sorted(wanted, key=lambda item: -item[0].parallel.gpus):
        ranks = _one_node(need, inventory, free) or _many_nodes(need, inventory, free)
        if not ranks:
            raise _does_not_fit(needs, need, index, inventory, free)
        placed[need.role, index] = ranks
    turn = 0
    for need in needs:
        for index in range(need.replicas if not need.gpus else 0):
            host = inventory.hosts[turn % len(inventory.hosts)]
            placed[need.role, index] = (Rank(host.name, host.address),)
            turn += 1
    return placed


def _one_node(need: Need, inventory: Inventory, free: dict[str, list[int]]) -> tuple[Rank, ...]:
    size = need.parallel.gpus
    fitting = [host for host in inventory.hosts if len(free[host.name]) >= size]
    if not fitting:
        return ()
    best = min(fitting, key=lambda host: len(free[host.name]))
    return (_take(best, size, free),)


def _many_nodes(need: Need, inventory: Inventory, free: dict[str, list[int]]) -> tuple[Rank, ...]:
    total, tensor = need.parallel.gpus, need.parallel.tensor
    largest = max(host.gpus for host in inventory.hosts)
    for count in range(2, len(inventory.hosts) + 1 if need.multi_node else 0):
        part, rest = divmod(total, count)
        whole_groups = part % tensor == 0 if tensor <= largest else part and tensor % part == 0
        if rest or not whole_groups:
            continue
        fitting = [host for host in inventory.hosts if len(free[host.name]) >= part]
        if len(fitting) >= count:
            chosen = sorted(fitting, key=lambda host: len(free[host.name]))[:count]
            order = {host.name: i for i, host in enumerate(inventory.hosts)}
            return tuple(_take(host, part, free) for host in sorted(chosen, key=lambda h: order[h.name]))
    return ()


def _take(host: Host, count: int, free: dict[str, list[int]]) -> Rank:
    taken, free[host.name] = free[host.name][:count], free[host.name][count:]
    return Rank(host.name, host.address, tuple(taken))


def _does_not_fit(
    needs: Sequence[Need], need: Need, index: int, inventory: Inventory, free: Mapping[str, list[int]]
) -> PlacementError:
    total = sum(n.replicas * n.parallel.gpus for n in needs if n.gpus)
    have = sum(host.gpus for host in inventory.hosts)
    nodes = ", ".join(f"{h.name} {len(free[h.name])} of {h.gpus} free" for h in inventory.hosts)
    size = need.parallel.gpus
    sizes = f"tensor {need.parallel.tensor} x pipeline {need.parallel.pipeline} x data {need.parallel.data}"
    if total > have:
        message = f"the recipe needs {total} GPUs, {inventory.source} has {have}"
    else:
        message = f"the recipe's {total} GPUs cannot be laid out on the {have} of {inventory.source}"
    return PlacementError(
        f"{message}: no room for {need.role}-{index} with {size} ({sizes}); {nodes}",
        where=f"roles.{need.role}",
        hint="fewer replicas, smaller parallel sizes, or --inventory FILE with more hosts",
    )
