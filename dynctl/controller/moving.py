"""Which lost nodes' workers go elsewhere, and where: worked out from what the run keeps on disk."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.room import Room
from dynctl.deploy.state import RunState


class More(Protocol):
    """A way to more nodes than a deployment has. `grown` counts how often it has got some."""

    grown: int

    def want(self, nodes: frozenset[str], lost: frozenset[str], plan: Plan) -> None:
        """There is no room for the workers of `nodes`, among those `lost`; none: no more is wanted.

        Said again and again. Does not block.
        """
        ...

    def told(self) -> str:
        """What it waits for, for people; "" = nothing."""
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

    def want(self, nodes: frozenset[str], lost: frozenset[str], plan: Plan) -> None:
        """As `More`."""

    def told(self) -> str:
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


def elsewhere(run: RunDir, plan: Plan, nodes: Collection[str], room: Room) -> Plan:
    """The plan without workers on `nodes`; what is moved goes where `room` leaves some.

    Raises PlacementError when there is no room, RecipeError, CodecError for a run that cannot be read. Reads
    files: not for the event loop.
    """
    # Here, since recipes are slow to load, and most controllers never move anything.
    from dynctl.deploy.amend import hosts_of
    from dynctl.deploy.rehome import rehome
    from dynctl.deploy.slurm_size import on_its_parts
    from dynctl.deploy.slurm_up import staged_recipe
    from dynctl.recipe.load import load_recipe

    loaded = load_recipe(run.lock, (), (), files_here=False)
    if loaded.recipe.target == "slurm":
        loaded = on_its_parts(staged_recipe(loaded))
    return rehome(loaded, hosts_of(run, plan), plan, room, nodes)
