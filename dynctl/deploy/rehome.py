"""The plan of a deployment of which a node is lost: its replicas elsewhere, all else as it was. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dynctl.deploy.plan import Kept, Plan, PlannedProcess
from dynctl.deploy.planner import build_plan
from dynctl.deploy.replan import context_of, keeping_off, kept_of, ports_taken
from dynctl.deploy.room import Room
from dynctl.errors import PlacementError
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory import Inventory


def rehome(
    loaded: LoadedRecipe,
    inventory: Inventory,
    old: Plan,
    room: Room,
    lost: Collection[str],
) -> Plan:
    """`old` with every replica that has a part on a `lost` node on others of the inventory, where its role
    may run: on GPUs that are free, or, when it uses none, on a spare node, one without workers. Frontends
    stay: clients know where they are. Nothing is moved to a node that `room` says is lost. Raises
    PlacementError when there is no room.
    """
    workers = [process for process in old.processes if process.kind == "worker"]
    moved = {(p.role, p.index) for p in workers if any(node in lost for node, _ in p.spots)}
    return relocate(
        loaded, inventory, old, replace(room, lost={**room.lost, **dict.fromkeys(lost, "")}), moved
    )


def relocate(
    loaded: LoadedRecipe, inventory: Inventory, old: Plan, room: Room, moved: Collection[tuple[str, int]]
) -> Plan:
    """As `rehome`, for replicas (role, index) of whichever nodes."""
    kept = kept_of(old, room)
    mine = {p.id for p in old.processes if (p.role, p.index) in moved}
    still = Kept(
        {replica: ranks for replica, ranks in kept.placement.items() if replica not in moved},
        {owner: port for owner, port in kept.ports.items() if owner.partition(":")[0] not in mine},
        kept.others,
    )
    off = _unfit(old, moved, room.lost)
    narrowed = keeping_off(loaded, inventory, {role for role, _ in moved}, off)
    new = build_plan(narrowed, inventory, ports_taken(old, room.ports), context_of(old), still)
    plan = replace(new, processes=_as_before(old, new, mine), roles=old.roles)
    if {p.id for p in plan.processes} != {p.id for p in old.processes}:
        raise PlacementError("the replicas of the lost node would be cut up in another way elsewhere")
    return plan


def _unfit(old: Plan, moved: Collection[tuple[str, int]], lost: Collection[str]) -> set[str]:
    """Nodes that are lost, or busy with others where GPUs do not say how much there is room for."""
    workers = [process for process in old.processes if process.kind == "worker"]
    by_gpu = any(one.gpus for one in workers if (one.role, one.index) in moved)
    busy = set() if by_gpu else {one.node for one in workers if (one.role, one.index) not in moved}
    return {*lost, *busy}


def _as_before(old: Plan, new: Plan, mine: Collection[str]) -> tuple[PlannedProcess, ...]:
    known = {process.id: process for process in old.processes}
    return tuple(p if p.id in mine else known.get(p.id, p) for p in new.processes)
