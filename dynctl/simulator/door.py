"""The frontend's queue on the simulated clock: requests wait while all workers have enough to do.

The order, the limits and the judgement are the frontend's own (`frontend.queue`, `router.busy`), and so is
the rule of `frontend.gate`: one turn at a time, the next only after whoever had it has been routed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dynctl.errors import Overloaded
from dynctl.frontend.queue import Ask, Place, Queue
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import BusySpec, QueueSpec
from dynctl.router.busy import Busy
from dynctl.router.service import Router
from dynctl.simulator.clock import Clock


class Door:
    """Where requests come in, each by its number. `ways` are called when it may be routed, and when it is
    told to come again later. `roles` are those a prompt needs; where prompts may go past prefill workers that
    are all busy, these are not asked.
    """

    def __init__(
        self,
        router: Router,
        roles: Sequence[Role],
        specs: tuple[QueueSpec, BusySpec],
        clock: Clock,
        ways: tuple[Callable[[int], None], Callable[[int], None]],
    ) -> None:
        spec, busy = specs
        self._router = router
        self._roles = tuple(roles)[router.spills and len(roles) > 1 :]
        self._spec = spec
        self._busy = Busy(busy, spec.threshold if spec.limit else 0.0)
        self._queue = Queue(spec)
        self._clock = clock
        self._route, self._refuse = ways
        self._waiting: dict[Place, int] = {}
        self._scheduled = False
        router.on_freed = self._wake

    @property
    def waiting(self) -> int:
        """How many wait here now."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Their prompt tokens."""
        return self._queue.waiting.tokens

    def full(self, role: Role) -> bool:
        """Whether all workers of a role have enough to do."""
        return self._busy.all_busy(self._router.eligible(role))

    def crowded(self, role: Role) -> frozenset[str]:
        """Workers over a threshold: to be passed over while there are others."""
        if not self._busy.limited:
            return frozenset()
        over = {one.instance.id for one in self._router.eligible(role) if self._busy.over(one.load)}
        return frozenset(over) if len(over) < len(self._router.eligible(role)) else frozenset()

    def come(self, number: int, ask: Ask) -> None:
        """A request: routed at once, or its turn comes, or it is refused."""
        if not self._waiting and not self._all_busy():
            self._route(number)
            return
        try:
            place = self._queue.join(ask, self._clock.now_s)
        except Overloaded:
            self._refuse(number)
            return
        self._waiting[place] = number
        self._clock.at(self._clock.now_s + self._spec.deadline_s, lambda: self._give_up(place))

    def _give_up(self, place: Place) -> None:
        number = self._waiting.pop(place, None)
        if number is not None:
            self._queue.leave(place)
            self._refuse(number)

    def _all_busy(self) -> bool:
        return any(self.full(role) for role in self._roles)

    def _wake(self) -> None:
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._clock.at(self._clock.now_s, self._give_turn)

    def _give_turn(self) -> None:
        self._scheduled = False
        if not self._waiting or self._all_busy():
            return
        place = self._queue.next(self._clock.now_s)
        if place is not None:
            self._route(self._waiting.pop(place))
        self._wake()
