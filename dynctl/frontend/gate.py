"""Whether a request may be routed now, waits for its turn, or is refused: the queue's clock and wake-ups.

Nothing is asked of a request that finds one calm worker and nobody waiting but a look at that worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from dynctl.errors import Overloaded
from dynctl.frontend.queue import Ask, Place, Queue
from dynctl.observability.metrics import Counter, Metrics
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import BusySpec, QueueSpec
from dynctl.router.busy import Busy
from dynctl.router.service import Router

logger = logging.getLogger(__name__)

_NOBODY: frozenset[str] = frozenset()


class Gate:
    """Before the router of one frontend. `roles` are those a prompt needs: all are asked for room, but for
    the first of several where `spills` says that prompts may go past it.

    One turn is given at a time, and the next only after whoever had it has been routed, so that each finds
    the load of those before. `model` is the label in metrics.
    """

    def __init__(
        self,
        router: Router,
        roles: Sequence[Role],
        spec: QueueSpec,
        busy: BusySpec,
        metrics: Metrics,
        model: str,
    ) -> None:
        self._router = router
        self.spills = False
        self._roles = tuple(roles)
        self._spec = spec
        self._busy = Busy(busy, spec.threshold if spec.limit else 0.0)
        self._queue = Queue(spec)
        self._turns: dict[Place, asyncio.Future[None]] = {}
        """Of those who wait, and of the one who has a turn and has not been routed yet."""
        self._scheduled = False
        labels = {"model": model, "worker_type": roles[0], "policy_class": spec.policy}
        waiting = self._queue.waiting
        metrics.gauge("router_queue_pending_requests", **labels).read = lambda: float(waiting.requests)
        metrics.gauge("router_queue_pending_isl_tokens", **labels).read = lambda: float(waiting.tokens)
        metrics.gauge("router_queue_pending_cached_tokens", **labels).read = lambda: float(waiting.cached)
        self._refused: Counter = metrics.counter("router_queue_backpressure_total", **labels)

    @property
    def thresholds(self) -> BusySpec:
        """From where on workers are busy."""
        return self._busy.thresholds

    @thresholds.setter
    def thresholds(self, thresholds: BusySpec) -> None:
        self._busy.thresholds = thresholds
        self._wake()

    @property
    def by_length(self) -> bool:
        """Whether it matters how much of a prompt is cached."""
        return self._spec.policy == "shortest"

    def closed(self) -> bool:
        """Whether a request that comes now has to `wait`."""
        return bool(self._turns) or self._all_busy()

    def check_room(self) -> None:
        """Raises Overloaded when a request that comes now would be refused: before its prompt is read."""
        if self._queue.full and (self._spec.limit or self._all_busy()):
            self._refused.inc()
            raise self._queue.refusal()

    def full(self, role: Role) -> bool:
        """Whether all workers of `role` have enough to do."""
        return self._busy.all_busy(self._router.eligible(role))

    def crowded(self, role: Role) -> frozenset[str]:
        """Workers of `role` over a threshold on all ranks: to be passed over while there are others."""
        if not self._busy.limited:
            return _NOBODY
        candidates = self._router.eligible(role)
        calm = {one.instance.id for one in candidates if not self._busy.over(one.load)}
        return frozenset(one.instance.id for one in candidates if one.instance.id not in calm)

    async def wait(self, ask: Ask) -> None:
        """Wait for a turn; the caller must then choose without awaiting anything before.

        Raises Overloaded when the queue is full, or the turn does not come in time.
        """
        loop = asyncio.get_running_loop()
        try:
            place = self._queue.join(ask, loop.time())
        except Overloaded:
            self._refused.inc()
            raise
        turn = self._turns[place] = loop.create_future()
        self._router.on_freed = self._wake
        try:
            async with asyncio.timeout(self._spec.deadline_s):
                await turn
        except TimeoutError:
            self._refused.inc()
            raise Overloaded(
                f"all workers were busy for {self._spec.deadline_s:g} s",
                retry_after_s=self._queue.retry_after_s(),
                hint="send it again later",
            ) from None
        finally:
            del self._turns[place]
            self._queue.leave(place)

    def _all_busy(self) -> bool:
        return any(self.full(role) for role in self._roles[self.spills :])

    def _wake(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._give_turn)

    def _give_turn(self) -> None:
        """Called in the loop's next round, and again one round after each turn: by then it has been used."""
        self._scheduled = False
        if not self._queue.waiting.requests:
            self._router.on_freed = None
            return
        if self._all_busy():
            return
        place = self._queue.next(asyncio.get_running_loop().time())
        if place is not None:
            turn = self._turns[place]
            if not turn.done():
                turn.set_result(None)
            self._wake()
