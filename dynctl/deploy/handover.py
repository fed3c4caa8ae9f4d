"""Which workers change between prefill and decode while their engines run on. Pure.

A replica of the one role that leaves and one of the other that comes in the same change are the same engine
where that would be started alike for both: the new seat then has the place and ports of the old one, and its
sidecar goes on with the engine that is there (`controller.handover`, `worker.handover`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from dynctl.command import Command
from dynctl.deploy.plan import Kept, Plan, PlannedProcess
from dynctl.engines import catalog
from dynctl.errors import PlacementError
from dynctl.launchers.base import ENV_PROCESS
from dynctl.protocol.instances import Role
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import RoleSection
from dynctl.topology.inventory import Inventory, is_awaited

Replica = tuple[str, int]
Pairs = dict[Replica, Replica]
"""The replica that comes (role, index) → the one whose engine it goes on with."""

_ROLES: tuple[tuple[Role, Role], ...] = (("prefill", "decode"), ("decode", "prefill"))


def candidates(loaded: LoadedRecipe, inventory: Inventory, old: Plan) -> Pairs:
    """Who might take over from whom, where `loaded` lets roles be: sizes and arguments are not looked at yet,
    see `same_engines`.

    An engine over several nodes has sidecars on each, and one that is a step of a Slurm job beside its
    sidecar's is found by its seat's name: these are started anew.
    """
    if not _either_role(loaded):
        return {}
    roles = loaded.recipe.roles.present()
    found: Pairs = {}
    for leaves, comes in _ROLES:
        may = _allowed(inventory, roles[comes].hosts)
        going = [
            (leaves, index)
            for index in reversed(range(roles[leaves].replicas, old.roles.get(leaves, 0)))
            if _whole(old, (leaves, index), may)
        ]
        coming = [(comes, index) for index in range(old.roles.get(comes, 0), roles[comes].replicas)]
        found |= dict(zip(coming, going, strict=False))
    return found


def started_alike(loaded: LoadedRecipe) -> bool:
    """Whether prefill and decode workers may change their role while their engines run, as far as the recipe
    says: whether each is on one node that both may be on, only a plan tells.
    """
    if not _either_role(loaded):
        return False
    recipe, roles = loaded.recipe, loaded.recipe.roles.present()
    prefill, decode = roles["prefill"], roles["decode"]

    def own(section: RoleSection) -> object:
        given = {"args": {**recipe.engine.args, **section.args}, "env": {**recipe.engine.env, **section.env}}
        return section.model_dump(exclude={"replicas", "hosts", "args", "env"}) | given

    barred = bool(prefill.hosts and decode.hosts) and set(prefill.hosts).isdisjoint(decode.hosts)
    if recipe.target == "slurm":
        steps = bool(recipe.engine.container) and recipe.engine.runtime == "pyxis"
        barred = steps or (recipe.slurm is not None and recipe.slurm.het is not None)
    return not barred and own(prefill) == own(decode)


def kept_by(pairs: Pairs, kept: Kept) -> Kept:
    """What is kept, and for each replica that comes the place and ports of the one it takes over from."""
    placement, ports = dict(kept.placement), dict(kept.ports)
    for comes, leaves in pairs.items():
        placement[comes] = kept.placement[leaves]
        seat, former = _seat(comes), _seat(leaves)
        for owner, port in kept.ports.items():
            process, _, name = owner.rpartition(":")
            if process in (former, f"{former}/engine"):
                ports[f"{process.replace(former, seat)}:{name}"] = port
    return replace(kept, placement=placement, ports=ports)


def same_engines(pairs: Pairs, old: Plan, new: Plan) -> Pairs:
    """Those whose engine would be started with the same command, but for the names of the seats."""
    was, now = ({p.id: p for p in plan.processes} for plan in (old, new))
    return {
        comes: leaves
        for comes, leaves in pairs.items()
        if _engine_of(was, leaves) == _engine_of(now, comes) is not None
    }


def with_handovers(pairs: Pairs, plan: Plan) -> Plan:
    """The plan that says so."""
    takes = {_seat(comes): _seat(leaves) for comes, leaves in pairs.items()}
    return replace(
        plan, processes=tuple(replace(p, takes=takes[p.id]) if p.id in takes else p for p in plan.processes)
    )


def _either_role(loaded: LoadedRecipe) -> bool:
    recipe = loaded.recipe
    apart = {"prefill", "decode"} <= recipe.roles.present().keys()
    return apart and catalog.takes_either_role(recipe.backend, recipe.engine.kv_transfer)


def _allowed(inventory: Inventory, hosts: Collection[str]) -> set[str]:
    try:
        chosen = inventory.select(list(hosts)) if hosts else inventory.hosts
    except PlacementError:
        return set()  # said by whoever places
    return {host.name for host in chosen}


def _whole(plan: Plan, replica: Replica, nodes: Collection[str]) -> bool:
    """Whether it is one sidecar with one engine, on one of these nodes."""
    parts = [p for p in plan.processes if p.kind == "worker" and (p.role, p.index) == replica]
    spots = [node for part in parts for node, _ in part.spots]
    return len(spots) == 1 and spots[0] in nodes and not is_awaited(spots[0])


def _engine_of(processes: dict[str, PlannedProcess], replica: Replica) -> object:
    """All that its engine is started with, in a form to compare; None = it has none of its own."""
    engine = processes.get(f"{_seat(replica)}/engine")
    return None if engine is None else (engine.node, engine.gpus, _nameless(engine.command))


def _nameless(command: Command) -> object:
    env = {name: value for name, value in command.env.items() if name != ENV_PROCESS}
    return command.argv, env, command.cwd, dict(command.files)


def _seat(replica: Replica) -> str:
    return f"{replica[0]}-{replica[1]}"
