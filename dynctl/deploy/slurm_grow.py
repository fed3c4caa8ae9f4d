"""More replicas than a deployment's job has room for: planned on nodes that are still to be given.

Such a node is in the plan under a name that no machine can have (`topology.inventory.AWAITED`), alike those
of the job's part that it belongs to. What is planned there is not started; once a follow-up job has brought
nodes it is planned anew on those (`deploy.rehome`), whichever they are. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import count

from dynctl.deploy.plan import Plan, PlannedProcess
from dynctl.deploy.replan import replan
from dynctl.deploy.room import Room
from dynctl.deploy.slurm_size import gpus_of_kind, kinds_of, without_spares
from dynctl.errors import PlacementError
from dynctl.protocol.instances import Role
from dynctl.recipe.check import parallel_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.slurm import Slurm
from dynctl.topology.inventory import AWAITED, Host, Inventory, is_awaited

_WHY = "it is still to be given"


def replan_or_grow(
    loaded: LoadedRecipe, there: Inventory, old: Plan, room: Room, given: Collection[str] = ()
) -> Plan:
    """As `replan` on the hosts `there`, with roles on their parts (`slurm_size.on_its_parts`); what has no
    room on them is planned on nodes that are to be given. `given` are those of follow-up jobs: ranks that are
    one step are all on nodes of the deployment's own job, or all on nodes to be given.

    Raises as `replan`, PlacementError also when more nodes are no help or are not to be asked for.
    """
    inventory, now = with_awaited(loaded, there, old, room)
    more = {
        role for role, one in loaded.recipe.roles.present().items() if one.replicas > old.roles.get(role, 0)
    }
    one_step = any(process.also and process.role in more for process in old.processes)
    within = replace(now, lost={**now.lost, **dict.fromkeys(given, _WHY)}) if one_step else now
    outside = dict.fromkeys((host.name for host in there.hosts), _WHY) if one_step else {}
    try:
        return replan(loaded, inventory, old, within)
    except PlacementError as error:
        if not (loaded.recipe.slurm or Slurm()).follow_up:
            hint = "slurm.follow_up: true would ask Slurm for more nodes"
            raise PlacementError(error.message, where=error.where, hint=hint) from error
        failure = error
    for _ in range(_gpus_added(loaded, old)):
        inventory = _one_more(loaded, there, inventory, old)
        try:
            return replan(loaded, inventory, old, replace(room, lost={**room.lost, **outside}))
        except PlacementError:
            continue
    raise failure


def with_awaited(loaded: LoadedRecipe, there: Inventory, plan: Plan, room: Room) -> tuple[Inventory, Room]:
    """The hosts with those to be given that the plan uses, and the room there is on them: none on these."""
    found: dict[str, Host] = {}
    for process in awaiting(plan):
        kind = _kind_of(loaded, process.role)
        for node in (name for name, _ in process.spots if is_awaited(name)):
            found.setdefault(node, _to_be_given(node, kind, gpus_of_kind(there, kind)))
    lost = {**room.lost, **dict.fromkeys(found, _WHY)}
    return replace(there, hosts=(*there.hosts, *found.values())), replace(room, lost=lost)


def awaiting(plan: Plan) -> list[PlannedProcess]:
    """The workers that wait for a node."""
    return [p for p in plan.processes if p.kind == "worker" and any(is_awaited(node) for node, _ in p.spots)]


def awaited_groups(plan: Plan, part_of: Sequence[str | None]) -> dict[int, list[int]]:
    """How many nodes are to be given by part of the job: a number for each set of nodes that is of use only
    together. `part_of`: the roles of the parts.
    """
    groups: list[tuple[int, set[str]]] = []
    for role, index in sorted({(p.role, p.index) for p in awaiting(plan)}):
        part = next((i for i, one in enumerate(part_of) if one is None or one == role), 0)
        mine = [p for p in awaiting(plan) if (p.role, p.index) == (role, index)]
        nodes = {node for p in mine for node, _ in p.spots if is_awaited(node)}
        joined = [group for group in groups if group[1] & nodes]
        nodes |= {node for group in joined for node in group[1]}
        groups = [*(group for group in groups if group not in joined), (part, nodes)]
    found: dict[int, list[int]] = {}
    for part, nodes in groups:
        found.setdefault(part, []).append(len(nodes))
    return found


def without_awaiting(plan: Plan) -> dict[str, int]:
    """Replicas by role, of the roles with some that wait for a node, when those are given up."""
    first: dict[str, int] = {}
    for process in awaiting(plan):
        first[process.role] = min(first.get(process.role, process.index), process.index)
    return first


def usable(
    loaded: LoadedRecipe, inventory: Inventory, given: Collection[str], used: Collection[str]
) -> Inventory:
    """The hosts of a job that new replicas may be on: spare ones only when they are `used` already.

    `given` are the nodes of follow-up jobs, all of which may be used.
    """
    own = replace(inventory, hosts=tuple(host for host in inventory.hosts if host.name not in given))
    first = {host.name for host in without_spares(loaded, own).hosts} if own.hosts else set()
    hosts = (host for host in inventory.hosts if host.name in {*first, *given, *used})
    return replace(inventory, hosts=tuple(hosts))


def _one_more(loaded: LoadedRecipe, there: Inventory, inventory: Inventory, old: Plan) -> Inventory:
    """The inventory with a node more to be given in each part of which a role is to grow."""
    hosts = list(inventory.hosts)
    for kind in dict.fromkeys(_kind_of(loaded, role) for role in _growing(loaded, old)):
        name = next(n for n in (f"{AWAITED}{i}" for i in count(1)) if n not in {h.name for h in hosts})
        hosts.append(_to_be_given(name, kind, gpus_of_kind(there, kind)))
    return replace(inventory, hosts=tuple(hosts))


def _growing(loaded: LoadedRecipe, old: Plan) -> list[Role]:
    present = loaded.recipe.roles.present()
    return [role for role, one in present.items() if one.replicas > old.roles.get(role, 0)]


def _gpus_added(loaded: LoadedRecipe, old: Plan) -> int:
    """As many nodes would do in any case."""
    present = loaded.recipe.roles.present()
    added = {role: max(0, one.replicas - old.roles.get(role, 0)) for role, one in present.items()}
    return sum(added[role] * parallel_of(one).gpus for role, one in present.items())


def _kind_of(loaded: LoadedRecipe, role: str) -> str | None:
    """The role whose nodes a worker of this one is on; None: all roles share them."""
    return next((kind for kind, _ in kinds_of(loaded) if kind in (None, role)), None)


def _to_be_given(name: str, kind: str | None, gpus: int) -> Host:
    return Host(name, name, gpus, labels=(kind,) if kind is not None else ())
