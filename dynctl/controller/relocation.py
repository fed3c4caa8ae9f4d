"""Has workers that have no node any more, or none yet, started where there is room, again and again.

What nodes are lacking is told to `moving.More`. Nodes that it says will not be given are given up: the
deployment goes on with the replicas that it has, and says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynctl.controller.claims import Claims
from dynctl.controller.day2 import Day2
from dynctl.controller.moves import Event, Moved
from dynctl.controller.moving import Lack, More, awaited, crippled, elsewhere, nodes_of, stranded
from dynctl.controller.planner_watch import Note
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.reseat import moved_seats
from dynctl.deploy.room import Room, merged
from dynctl.deploy.state import RunState
from dynctl.errors import DynctlError
from dynctl.launchers.fleet import Fleet
from dynctl.topology.inventory import is_awaited

logger = logging.getLogger(__name__)

AGAIN_S = 2.0
NO_ROOM_AGAIN_S = 30.0
"""Others may have made room meanwhile."""
GIVE_UP_AGAIN_S = 5.0
ENDED_WITHIN_S = 5.0

_Tried = tuple[frozenset[str], frozenset[str], Plan, int]


@dataclass(frozen=True, slots=True)
class Hands:
    """What it works with. `feed` hands events to the supervisor, `changed` acts on a changed state."""

    run: RunDir
    state: RunState
    fleet: Fleet
    claims: Claims
    day2: Day2
    more: More
    note: Note
    feed: Callable[[Event], None]
    changed: Callable[[], None]


class Relocation:
    """Make and use it inside a running loop."""

    def __init__(self, hands: Hands) -> None:
        self._hands = hands
        self._moving: asyncio.Task[None] | None = None
        self._move_at = 0.0
        self._no_room: _Tried | None = None
        self._roomless: frozenset[str] = frozenset()
        self._moved_from: dict[str, dict[str, int]] = {}
        self._hopeless = ""
        self._lost: frozenset[str] = frozenset()
        self._plan: Plan | None = None
        self._coming: frozenset[str] = frozenset()
        self._used: frozenset[str] = frozenset()

    def left_on(self, node: str) -> Mapping[str, int]:
        """The seats, with their incarnations, that were moved away from a node. Told once."""
        return self._moved_from.pop(node, {})

    def see_to(self, lost: frozenset[str]) -> None:
        """Begin what is to be done now. `lost` are nodes that cannot be reached. Does not block."""
        hands = self._hands
        state, plan, more = hands.state, hands.day2.plan, hands.more
        if plan is not self._plan:
            self._plan, self._coming = plan, awaited(plan)
            self._used = nodes_of(plan)
        coming = self._coming
        nodes = stranded(state, lost) | crippled(state, lost, plan) | coming
        busy = self._used.union(seat.node for seat in state.seats)
        more.want(Lack(nodes & (self._roomless | coming), lost, busy, plan))
        self._lost, said = lost, more.hopeless()
        self._hopeless = (said or self._hopeless) if coming else ""
        if not nodes:
            return
        tried = (nodes, lost, plan, more.grown)
        wait_s = NO_ROOM_AGAIN_S if tried == self._no_room and not self._hopeless else 0.0
        at_it = self._moving is not None and not self._moving.done()
        if at_it or time.monotonic() < self._move_at + wait_s:
            return
        self._move_at = time.monotonic() + AGAIN_S
        work = self._give_up() if self._hopeless and coming else self._move(*tried)
        self._moving = asyncio.get_running_loop().create_task(work, name="move")

    async def close(self) -> None:
        """Leave everything as it is."""
        if self._moving is not None:
            self._moving.cancel()
            await asyncio.gather(self._moving, return_exceptions=True)

    async def _move(self, nodes: frozenset[str], lost: frozenset[str], before: Plan, grown: int) -> None:
        """Start the workers of these nodes on others, if there is room, which their GPUs are claimed for."""
        hands = self._hands
        try:
            room = merged(Room(lost=dict.fromkeys(lost, "")), await hands.fleet.room())
            plan = await asyncio.to_thread(elsewhere, hands.run, before, nodes, room)
            await self._end_steps(before, plan)
            async with hands.claims.growing(before, plan):
                if lost == self._lost and hands.day2.plan is before and hands.state.phase != "stopping":
                    self._take(before, plan)  # else it is seen to anew, as it is by then
        except DynctlError as error:
            tried = (nodes, lost, before, grown)
            known = [node for node in sorted(nodes) if not is_awaited(node)]
            if tried != self._no_room and known:
                then = await asyncio.to_thread(hands.more.remedy)
                # The error's own hint is for whoever writes a recipe.
                hands.note("node.no_room", {"node": ", ".join(known), "message": f"{error.message}; {then}"})
            self._no_room, self._roomless = tried, nodes

    async def _end_steps(self, before: Plan, plan: Plan) -> None:
        """End what is left, on nodes that live, of engines over several nodes that are to be moved."""
        for seat_id in moved_seats(before, plan):
            seat, process = self._hands.state.seat(seat_id), before.process(seat_id)
            if seat is not None and seat.incarnation and process.also:
                await self._hands.fleet.clear(process.node, seat_id, seat.incarnation, ENDED_WITHIN_S)

    def _take(self, before: Plan, plan: Plan) -> None:
        hands = self._hands
        left = {seat: before.process(seat).node for seat in moved_seats(before, plan)}
        away = {seat: node for seat, node in left.items() if not is_awaited(node)}
        seats = [seat for seat in hands.state.seats if seat.id in away]
        for seat in seats:
            self._moved_from.setdefault(away[seat.id], {})[seat.id] = seat.incarnation
        if not left or not hands.day2.take(plan):
            return
        for seat_id in sorted(set(left) - set(away)):
            hands.note("process.placed", {"id": seat_id, "node": plan.process(seat_id).node})
        if away:
            hands.feed(Moved({seat_id: plan.process(seat_id).node for seat_id in away}))
        hands.changed()

    async def _give_up(self) -> None:
        """Go on with the replicas that have a node."""
        # Here, since recipes are slow to load, and most controllers never grow.
        from dynctl.controller.amending import give_up

        hands, why = self._hands, self._hopeless
        try:
            words = await asyncio.to_thread(give_up, hands.run, why)
        except DynctlError as error:
            self._move_at = time.monotonic() + GIVE_UP_AGAIN_S
            logger.warning("growth.not_given_up error=%s", error)
            return
        self._hopeless = ""
        hands.note("growth.given_up", {"wanted": words, "message": why})
