"""Which replica runs on which node and GPUs. Pure and deterministic.

Replicas are placed largest first, each whole on the node where the fewest GPUs stay free; one that fits no
node is cut into equal parts over as few nodes as will do, and a tensor-parallel group crosses nodes only when
it is larger than a node. A GPU belongs to one replica. Replicas without GPUs go round the nodes. Roles that
may run on few nodes only are placed before those that may run on more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dynctl.engines.base import Parallel, Rank
from dynctl.errors import PlacementError
from dynctl.topology.inventory import Host, Inventory


@dataclass(frozen=True, slots=True)
class Need:
    """Replicas of one role. `gpus` False: they need none. `multi_node` False: each must fit one node.

    `hosts` are the names of those it may run on; empty: all.
    """

    role: str
    replicas: int
    parallel: Parallel
    gpus: bool = True
    multi_node: bool = True
    hosts: tuple[str, ...] = ()


Placement = Mapping[tuple[str, int], tuple[Rank, ...]]
"""(role, index) → the replica's parts, the head first."""


def place(
    needs: Sequence[Need],
    inventory: Inventory,
    kept: Placement | None = None,
    others: Collection[tuple[str, int]] = (),
) -> Placement:
    """A place for every replica: the one it has by `kept`, else a free one. `others` are GPUs (node, index)
    that are not to be had.

    Raises PlacementError that names need and have, in total and per node.
    """
    _require_known(needs, inventory)
    placed = _stay(needs, kept or {})
    used = {(rank.node, gpu) for ranks in placed.values() for rank in ranks for gpu in rank.gpus}
    used.update(others)
    free = {h.name: [gpu for gpu in range(h.gpus) if (h.name, gpu) not in used] for h in inventory.hosts}
    wanted = [(need, index) for need in needs if need.gpus for index in range(need.replicas)]
    wanted = [(need, index) for need, index in wanted if (need.role, index) not in placed]
    for need, index in sorted(wanted, key=lambda item: _order(item[0], inventory)):
        ranks = _one_node(need, inventory, free) or _many_nodes(need, inventory, free)
        if not ranks:
            raise _does_not_fit(needs, need, index, inventory, free)
        placed[need.role, index] = ranks
    turns: dict[tuple[str, ...], int] = {}
    for need in needs:
        hosts = _allowed(need, inventory)
        for index in range(need.replicas if not need.gpus else 0):
            turn = turns.get(need.hosts, 0)
            host = hosts[turn % len(hosts)]
            placed.setdefault((need.role, index), (Rank(host.name, host.address),))
            turns[need.hosts] = turn + 1
    return placed


def _stay(needs: Sequence[Need], kept: Placement) -> dict[tuple[str, int], tuple[Rank, ...]]:
    """Those of `kept` that are wanted still."""
    wanted = [(need.role, index) for need in needs for index in range(need.replicas)]
    return {replica: kept[replica] for replica in wanted if replica in kept}


def _require_known(needs: Sequence[Need], inventory: Inventory) -> None:
    """See that the GPUs of all hosts that may give some have been counted. Raises PlacementError."""
    for need in needs:
        for host in _allowed(need, inventory) if need.gpus else ():
            if host.discover:
                raise PlacementError(
                    f"how many GPUs {host.name} of {inventory.source} has is not known yet (gpus: auto)",
                    where=f"roles.{need.role}",
                    hint="dynctl up asks the hosts; to plan without them, write the number of GPUs instead",
                )


def _order(need: Need, inventory: Inventory) -> tuple[int, int]:
    return len(_allowed(need, inventory)), -need.parallel.gpus


def _allowed(need: Need, inventory: Inventory) -> list[Host]:
    """The hosts it may run on, in the order of the inventory."""
    return [host for host in inventory.hosts if not need.hosts or host.name in need.hosts]


def _one_node(need: Need, inventory: Inventory, free: dict[str, list[int]]) -> tuple[Rank, ...]:
    size = need.parallel.gpus
    fitting = [host for host in _allowed(need, inventory) if len(free[host.name]) >= size]
    if not fitting:
        return ()
    best = min(fitting, key=lambda host: len(free[host.name]))
    return (_take(best, size, free),)


def _many_nodes(need: Need, inventory: Inventory, free: dict[str, list[int]]) -> tuple[Rank, ...]:
    total, tensor = need.parallel.gpus, need.parallel.tensor
    hosts = _allowed(need, inventory)
    largest = max(host.gpus for host in hosts)
    for count in range(2, len(hosts) + 1 if need.multi_node else 0):
        part, rest = divmod(total, count)
        whole_groups = part % tensor == 0 if tensor <= largest else part and tensor % part == 0
        if rest or not whole_groups:
            continue
        fitting = [host for host in hosts if len(free[host.name]) >= part]
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
    only = f" on {', '.join(need.hosts)}" if need.hosts else ""
    sizes = f"tensor {need.parallel.tensor} x pipeline {need.parallel.pipeline} x data {need.parallel.data}"
    if total > have:
        message = f"the recipe needs {total} GPUs, {inventory.source} has {have}"
    else:
        message = f"the recipe's {total} GPUs cannot be laid out on the {have} of {inventory.source}"
    return PlacementError(
        f"{message}: no room{only} for {need.role}-{index} with {size} ({sizes}); {nodes}",
        where=f"roles.{need.role}",
        hint=f"fewer replicas, smaller parallel sizes, or {inventory.more}",
    )
