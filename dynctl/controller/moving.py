"""Which lost nodes' workers go elsewhere, and where: worked out from what the run keeps on disk."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.room import Room
from dynctl.deploy.state import RunState
from dynctl.errors import PlacementError
from dynctl.topology.inventory import is_awaited


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


def awaited(plan: Plan) -> frozenset[str]:
    """The nodes of the plan that are still to be given."""
    return frozenset(process.node for process in plan.processes if is_awaited(process.node))


def elsewhere(run: RunDir, plan: Plan, nodes: Collection[str], room: Room) -> Plan:
    """The plan without workers on `nodes`, as far as `room` leaves some: all of the lost ones or none, of
    those still to be given one replica after another.

    Raises PlacementError when there is room for nothing, RecipeError, CodecError for a run that cannot be
    read. Reads files: not for the event loop.
    """
    # Here, since recipes are slow to load, and most controllers never move anything.
    from dynctl.deploy.amend import hosts_of, in_its_job
    from dynctl.deploy.rehome import rehome, relocate
    from dynctl.deploy.slurm_grow import with_awaited
    from dynctl.recipe.load import load_recipe

    loaded, all_hosts = load_recipe(run.lock, (), (), files_here=False), hosts_of(run, plan)
    hosts = all_hosts
    if loaded.recipe.target == "slurm":
        loaded, hosts = in_its_job(run, loaded, plan)
    lost = [node for node in nodes if not is_awaited(node)]
    waiting = {(p.role, p.index) for p in plan.processes if p.kind == "worker" and is_awaited(p.node)}
    made, failure = plan, None
    for moved in [None] * bool(lost) + [{replica} for replica in sorted(waiting)]:
        there, now = with_awaited(loaded, all_hosts if moved is None else hosts, made, room)
        try:
            made = (
                rehome(loaded, there, made, now, lost)
                if moved is None
                else relocate(loaded, there, made, now, moved)
            )
        except PlacementError as error:
            failure = failure or error
    if made is plan and failure is not None:
        raise failure
    return made
