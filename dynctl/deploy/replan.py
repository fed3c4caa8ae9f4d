"""The plan of a deployment that runs, made anew: what stays keeps its place and its ports. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from dynctl.deploy.digest import digest_of, reasons
from dynctl.deploy.handover import Pairs, candidates, kept_by, same_engines, with_handovers
from dynctl.deploy.plan import Kept, Plan, PlannedProcess
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import SEAT_KINDS
from dynctl.deploy.room import Room
from dynctl.deploy.seats import NodeContext, RunContext
from dynctl.engines.base import Rank
from dynctl.errors import PlacementError, RecipeError
from dynctl.recipe.check import parallel_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import RoleSection
from dynctl.topology.inventory import Inventory
from dynctl.topology.ports import first_port_of

Taken = Iterable[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Seats of the new plan that the old has not, those it has no more, and why those in both differ.

    `taken`: of those added, the ones that go on with the engine of one removed, which is that.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: Mapping[str, tuple[str, ...]] | None = None
    taken: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    @property
    def handed_over(self) -> list[str]:
        """Which becomes which, a line each."""
        return [f"{former} becomes {seat}, its engine runs on" for seat, former in self.taken.items()]


def replan(loaded: LoadedRecipe, inventory: Inventory, old: Plan, room: Room) -> Plan:
    """The plan of `loaded` for the run of `old`; nothing new is on a lost node. Raises PlacementError,
    PortInUse, and RecipeError for what cannot be changed while it serves.
    """
    recipe = loaded.recipe
    fixed = {
        "name": (old.name, recipe.name),
        "target": (old.target, recipe.target),
        "backend": (old.backend, recipe.backend),
        "model.served_name": (old.model, recipe.model.name),
        "roles": (sorted(old.roles), sorted(recipe.roles.present())),
    }
    for what, (was, now) in fixed.items():
        if was != now:
            raise _unrollable(f"{what} changes from {_words(was)} to {_words(now)}", loaded.where(what))
    hosts = _used(inventory, old)
    more = [role for role, one in recipe.roles.present().items() if one.replicas > old.roles[role]]
    living = keeping_off(loaded, hosts, more, room.lost)
    taken, kept = ports_taken(old, room.ports), kept_of(old, room)

    def made(pairs: Pairs) -> Plan:
        return build_plan(living, hosts, taken, context_of(old), kept_by(pairs, kept))

    pairs = candidates(living, hosts, old)
    plan = made(pairs)
    same = same_engines(pairs, old, plan)
    plan = with_handovers(same, plan if same == pairs else made(same))
    _require_places(old, plan, loaded)
    return plan


def with_stand_ins(
    loaded: LoadedRecipe, inventory: Inventory, plan: Plan, room: Room, roles: Sequence[str]
) -> Plan:
    """`plan` with one replica more of each of these roles, as far as there is room."""
    processes, sections = plan.processes, loaded.recipe.roles
    hosts = _used(inventory, plan)
    for role in roles:
        section = sections.present().get(role)  # type: ignore[call-overload]
        if section is None or section.urls:
            continue
        more = section.model_copy(update={"replicas": section.replicas + 1})
        wider = sections.model_copy(update={role: more})
        base = replace(plan, processes=processes)
        try:
            wanted = replace(loaded, recipe=loaded.recipe.model_copy(update={"roles": wider}))
            grown = build_plan(
                keeping_off(wanted, hosts, [role], room.lost),
                hosts,
                ports_taken(base, room.ports),
                context_of(plan),
                kept_of(base, room),
            )
        except PlacementError:
            continue
        extra = [p for p in grown.processes if p.role == role and p.index == section.replicas]
        if not {gpu for p in extra for gpu in _gpus(p)} & {gpu for p in processes for gpu in _gpus(p)}:
            processes, sections = (*processes, *extra), wider
    return replace(plan, processes=processes)


def as_before(old: Plan, new: Plan) -> Plan:
    """`new`, in which processes that are in both stay as `old` has them: another release of dynctl may write
    their commands in another way, which is no reason to replace what nobody asked to.
    """
    known = {process.id: process for process in old.processes}
    return replace(new, processes=tuple(known.get(p.id, p) for p in new.processes))


def keeping_off(
    loaded: LoadedRecipe, inventory: Inventory, roles: Collection[str], off: Collection[str]
) -> LoadedRecipe:
    """The recipe in which these roles keep off some nodes. Raises PlacementError when no other is left."""
    sections = loaded.recipe.roles
    update: dict[str, RoleSection] = {}
    for role, section in sections.present().items():
        if role not in roles or not off:
            continue
        may = inventory.select(section.hosts) if section.hosts else inventory.hosts
        living = [host.name for host in may if host.name not in off]
        if not living:
            raise PlacementError(f"no spare host is left that {role} may run on", where=f"roles.{role}.hosts")
        update[role] = section.model_copy(update={"hosts": living})
    recipe = loaded.recipe.model_copy(update={"roles": sections.model_copy(update=update)})
    return replace(loaded, recipe=recipe)


def without_stand_ins(plan: Plan) -> Plan:
    """The plan without what only stands in for others."""
    return replace(plan, processes=tuple(p for p in plan.processes if not _extra(p, plan)))


def compare(old: Plan, new: Plan) -> Difference:
    """What becomes of the seats."""
    was, now = _seats(old), _seats(new)
    return Difference(
        added=tuple(seat for seat in now if seat not in was),
        removed=tuple(seat for seat in was if seat not in now),
        changed={
            seat: tuple(reasons(was[seat], now[seat]))
            for seat in now
            if seat in was and digest_of(was[seat]) != digest_of(now[seat])
        },
        taken={seat: now[seat].takes for seat in now if seat not in was and now[seat].takes in was},
    )


def context_of(plan: Plan) -> RunContext:
    """The run that a plan was made for."""
    head = plan.process("controller")
    nodes = {
        p.node: NodeContext(p.command.cwd or "", p.command.argv[0])
        for p in plan.processes
        if p.kind != "engine"
    }
    first = first_port_of(plan.run_id)
    return RunContext(plan.run_id, head.command.cwd or "", head.command.argv[0], first, nodes)


def kept_of(plan: Plan, room: Room) -> Kept:
    """Where everything is, and what others have."""
    addresses = {node.name: node.address for node in plan.nodes}
    placement: dict[tuple[str, int], tuple[Rank, ...]] = {}
    for process in plan.processes:
        if process.kind == "worker":
            ranks = [Rank(node, addresses[node], gpus) for node, gpus in process.spots]
            replica = process.role, process.index
            placement[replica] = (*placement.get(replica, ()), *ranks)
    ports = {f"{p.id}:{name}": port for p in plan.processes for name, port in p.ports.items()}
    return Kept(placement, ports, room.gpus)


def _require_places(old: Plan, new: Plan, loaded: LoadedRecipe) -> None:
    """What is in both plans is where it was, with as many GPUs as it needs."""
    was = _seats(old)
    for seat, process in _seats(new).items():
        before = was.get(seat)
        if before is not None and before.node != process.node:
            message = f"{seat} would move from {before.node} to {process.node}"
            raise _unrollable(message, loaded.where(f"roles.{process.role}"))
    sizes: dict[str, int] = {
        role: parallel_of(section).gpus for role, section in loaded.recipe.roles.present().items()
    }
    for process in was.values():
        wanted = sizes.get(process.role)
        parts = [p for p in was.values() if (p.role, p.index) == (process.role, process.index)]
        have = sum(len(gpus) for p in parts for _, gpus in p.spots)
        if wanted is not None and have and have != wanted:
            message = f"a replica of {process.role} would have {wanted} GPUs instead of {have}"
            raise _unrollable(message, loaded.where(f"roles.{process.role}"))


def _seats(plan: Plan) -> dict[str, PlannedProcess]:
    return {p.id: p for p in plan.processes if p.kind in SEAT_KINDS and not _stands_in(p, plan)}


def _stands_in(process: PlannedProcess, plan: Plan) -> bool:
    return process.kind == "worker" and process.index >= plan.roles.get(process.role, 0)


def _extra(process: PlannedProcess, plan: Plan) -> bool:
    """Whether it is a stand-in or a part of one."""
    return process.kind in ("worker", "engine") and process.index >= plan.roles.get(process.role, 0)


def _used(inventory: Inventory, plan: Plan) -> Inventory:
    """The hosts that the run is on: nothing is set up on others, but on Slurm, where a node needs nothing."""
    if plan.target == "slurm":
        return inventory
    names = {node.name for node in plan.nodes}
    hosts = tuple(host for host in inventory.hosts if host.name in names)
    return replace(inventory, hosts=hosts or inventory.hosts)


def ports_taken(plan: Plan, taken: Taken) -> set[tuple[str, int]]:
    """Ports that new processes cannot have: also those of what is about to leave."""
    own = {(node.name, port) for node in plan.nodes for port in node.ports}
    own |= {(p.node, port) for p in plan.processes for port in p.ports.values()}
    return {*taken, *own}


def _gpus(process: PlannedProcess) -> list[tuple[str, int]]:
    return [(node, gpu) for node, gpus in process.spots for gpu in gpus]


def _unrollable(message: str, where: str) -> RecipeError:
    return RecipeError(
        f"{message}: that cannot be changed while it serves", where=where, hint="dynctl down, then up"
    )


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
