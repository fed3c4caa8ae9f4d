"""Which GPUs the run claims on its nodes: first claimed, then used, given up when nothing uses them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from dynctl.deploy.plan import Plan
from dynctl.deploy.state import RunState
from dynctl.errors import DynctlError
from dynctl.launchers.fleet import Fleet

logger = logging.getLogger(__name__)

AGAIN_S = 5.0
"""After a node could not be told what it has to hold."""

Gpus = Mapping[str, frozenset[int]]
"""By node."""


def gpus_of(plan: Plan, state: RunState) -> Gpus:
    """What is to be claimed: the GPUs of the plan, and of what leaves but still runs."""
    found: dict[str, set[int]] = {node.name: set() for node in plan.nodes}
    for process in plan.processes:
        for node, gpus in process.spots:
            found.setdefault(node, set()).update(gpus)
    for seat in state.seats:
        if seat.asked == "leave":
            found.setdefault(seat.node, set()).update(seat.gpus)
    return {node: frozenset(gpus) for node, gpus in found.items()}


class Claims:
    """Keeps the nodes' claims true to a plan. Make and use it inside a running loop."""

    def __init__(self, fleet: Fleet, state: RunState) -> None:
        self._fleet = fleet
        self._state = state
        self._lock = asyncio.Lock()
        self._held: dict[str, frozenset[int]] = {}
        self._seen: tuple[Plan, frozenset[str]] | None = None
        self._wanted: Gpus = {}
        self._task: asyncio.Task[None] | None = None
        self._at = 0.0

    @asynccontextmanager
    async def growing(self, old: Plan, new: Plan) -> AsyncIterator[None]:
        """Hold what `new` has beyond `old` while the block takes it over; if that fails it is given back.

        Raises PlacementError for a GPU that another deployment has, LaunchError for a node that does not
        answer. One change at a time.
        """
        async with self._lock:
            was, now = gpus_of(old, self._state), gpus_of(new, self._state)
            grown = {node: gpus | was.get(node, frozenset()) for node, gpus in now.items()}
            more = {node: gpus for node, gpus in grown.items() if gpus != was.get(node, frozenset())}
            self._seen = None
            await self._hold(more)
            yield

    def see_to(self, plan: Plan, busy: Collection[str]) -> None:
        """Begin to claim what the plan says where that is not claimed, except on `busy` nodes, on which
        something is being ended or started. Does not block.
        """
        seen = plan, frozenset(seat.id for seat in self._state.seats if seat.asked == "leave")
        if self._seen is None or self._seen[0] is not plan or self._seen[1] != seen[1]:
            self._seen, self._wanted = seen, gpus_of(plan, self._state)
        if not self._held and not any(self._wanted.values()):
            return  # it has never used any
        differ = {n: gpus for n, gpus in self._wanted.items() if self._held.get(n) != gpus and n not in busy}
        at_it = self._lock.locked() or (self._task is not None and not self._task.done())
        if differ and not at_it and time.monotonic() >= self._at:
            self._at = time.monotonic() + AGAIN_S
            self._task = asyncio.get_running_loop().create_task(self._settle(differ), name="claims")

    def forget(self, node: str) -> None:
        """What is claimed there is not known any more: it has been away."""
        self._held.pop(node, None)

    async def close(self) -> None:
        """Leave everything as it is."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _settle(self, wanted: Gpus) -> None:
        async with self._lock:
            try:
                await self._hold(wanted)
                self._at = 0.0
            except DynctlError as error:
                logger.warning("gpus.unclaimed error=%s", error)

    async def _hold(self, wanted: Gpus) -> None:
        """Claim on all nodes at once; the first error is raised when all have answered."""
        for node in wanted:
            self._held.pop(node, None)
        calls = (self._fleet.hold(node, gpus) for node, gpus in wanted.items())
        told = await asyncio.gather(*calls, return_exceptions=True)
        for (node, gpus), error in zip(wanted.items(), told, strict=True):
            if error is None:
                self._held[node] = gpus
        for error in told:
            if error is not None:
                raise error
