"""Which lost nodes' workers go elsewhere, and where: worked out from what the run keeps on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.room import Room
from dynctl.deploy.state import RunState
from dynctl.errors import PlacementError
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.topology.inventory import Inventory, is_awaited


@dataclass(frozen=True, slots=True)
class Lack:
    """What a deployment lacks. `nodes`: those for whose workers there is no room, lost ones and ones still
    to be given. `lost`: all that cannot be reached; `busy`: all that anything of the deployment is on.
    """

    nodes: frozenset[str]
    lost: frozenset[str]
    busy: frozenset[str]
    plan: Plan


class More(Protocol):
    """A way to more nodes than a deployment has. `grown` counts how often it has got some."""

    grown: int

    def want(self, lack: Lack) -> None:
        """Nodes are lacking, or with none in `lack` no longer. Said again and again. Does not block."""
        ...

    def told(self) -> str:
        """What it waits for, for people; "" = nothing."""
        ...

    def hopeless(self) -> str:
        """Why nodes that are still to be given will not be; "" = they may be. Told once."""
        ...

    def remedy(self) -> str:
        """What becomes of a lost node's workers when there is no room for them, for people. Blocks."""
        ...

    async def dismiss(self) -> None:
        """The run has ended: give all back. Called before `close`, if at all."""
        ...

    async def close(self) -> None:
        """Look after it no longer; what has been got stays."""
        ...


class NoMore:
    """The nodes are those of the plan."""

    grown = 0

    def want(self, lack: Lack) -> None:
        """As `More`."""

    def told(self) -> str:
        """As `More`."""
        return ""

    def hopeless(self) -> str:
        """As `More`."""
        return ""

    def remedy(self) -> str:
        """As `More`."""
        return "they are left as they are until it answers again, or there is room"

    async def dismiss(self) -> None:
        """As `More`."""

    async def close(self) -> None:
        """As `More`."""


_SERVES = ("ready", "draining", "silent")


def stranded(state: RunState, lost: Collection[str]) -> frozenset[str]:
    """The lost nodes with workers that are gone. Where one still renews its lease only the agent is: what
    serves is not moved.
    """
    there = [seat for seat in state.seats if seat.kind == "worker" and seat.node in lost]
    serving = {seat.node for seat in there if seat.state in _SERVES}
    return frozenset({seat.node for seat in there if seat.state in ("lost", "backoff")} - serving)


def crippled(state: RunState, lost: Collection[str], plan: Plan) -> frozenset[str]:
    """The lost nodes on which an engine that is gone had ranks, without a worker of ours there."""
    if not lost:
        return frozenset()
    heads = {seat.id for seat in state.seats if seat.state in ("lost", "backoff", "starting")}
    spread = [process for process in plan.processes if process.also and process.id in heads]
    return frozenset(node for process in spread for node, _ in process.also if node in lost)


def awaited(plan: Plan) -> frozenset[str]:
    """The nodes of the plan that are still to be given."""
    return frozenset(node for node in nodes_of(plan) if is_awaited(node))


def nodes_of(plan: Plan) -> frozenset[str]:
    """All nodes that anything of the plan is on."""
    return frozenset(node for process in plan.processes for node, _ in process.spots)


def elsewhere(run: RunDir, plan: Plan, nodes: Collection[str], room: Room) -> Plan:
    """The plan without workers on `nodes`, as far as `room` leaves some: all of the lost ones or none, of
    those still to be given one replica after another.

    Raises PlacementError when there is room for nothing, RecipeError, CodecError for a run that cannot be
    read. Reads files: not for the event loop.
    """
    # Here, since recipes are slow to load, and most controllers never move anything.
    from dynctl.deploy.amend import hosts_of, in_its_job
    from dynctl.deploy.rehome import relocate
    from dynctl.deploy.slurm_grow import with_awaited
    from dynctl.recipe.load import load_recipe

    loaded, all_hosts = load_recipe(run.lock, (), (), files_here=False), hosts_of(run, plan)
    hosts = all_hosts
    if loaded.recipe.target == "slurm":
        loaded, hosts = in_its_job(run, loaded, plan)
    lost = {node: "" for node in nodes if not is_awaited(node)}
    room = replace(room, lost={**room.lost, **lost})
    gone, waiting, one_step = _replicas(plan, lost)
    jobs = _jobs(run, all_hosts) if loaded.recipe.target == "slurm" else [frozenset[str]()]
    steps = [(gone - one_step, all_hosts)] if gone - one_step else []
    steps += [({one}, all_hosts) for one in sorted(gone & one_step)] + [
        ({one}, hosts) for one in sorted(waiting)
    ]
    made, failure = plan, None
    for moved, those in steps:
        there, now = with_awaited(loaded, those, made, room)
        for off in jobs if moved <= one_step else [frozenset[str]()]:
            try:
                only = replace(now, lost={**now.lost, **dict.fromkeys(off, "")})
                made = relocate(loaded, there, made, only, moved)
            except PlacementError as error:
                failure = failure or error
            else:
                break
    if made is plan and failure is not None:
        raise failure
    return made


_Replicas = set[tuple[str, int]]


def _replicas(plan: Plan, lost: Collection[str]) -> tuple[_Replicas, _Replicas, _Replicas]:
    """Those with a part on a lost node, those that wait for a node, and those whose ranks are one step."""
    workers = [process for process in plan.processes if process.kind == "worker"]
    gone = {(p.role, p.index) for p in workers if any(node in lost for node, _ in p.spots)}
    waiting = {(p.role, p.index) for p in workers if any(is_awaited(node) for node, _ in p.spots)}
    return gone, waiting - gone, {(p.role, p.index) for p in workers if p.also}


def _jobs(run: RunDir, hosts: Inventory) -> list[frozenset[str]]:
    """For each job, the hosts that are not its own: a step is of one job."""
    names = {host.name for host in hosts.hosts}
    given = [set(one.nodes) for one in load_follow_ups(run.path) if one.nodes]
    own = names.difference(*given)
    return [frozenset(names - job) for job in (own, *given) if job]
