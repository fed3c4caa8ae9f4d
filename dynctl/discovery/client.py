"""The registry seen from a process: keep one lease alive, or follow the membership.

Both outlive the registry: while it is away a process serves on and a frontend keeps its last view.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec

from dynctl.discovery.lease import Changes
from dynctl.discovery.view import MembershipView
from dynctl.errors import DynctlError, TransportError
from dynctl.protocol.instances import Instance
from dynctl.protocol.planner import PLANNER_TOPIC, PlannerFigures
from dynctl.protocol.registry import (
    MEMBERSHIP,
    GetMembers,
    InstanceState,
    LeaseReply,
    Leave,
    Member,
    Membership,
    MembershipChange,
    Register,
    Renew,
)
from dynctl.transport.control import ControlClient
from dynctl.transport.event_plane import Subscriber
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

_FIRST_PERIOD_S = 1.0
"""Between tries until the registry has said its TTL."""
_SYNC_PERIOD_S = 1.0
_RETRY_S = 0.25
_DEADLINE_S = 2.0
_AWAY_DEADLINE_S = 0.2


class Registrar:
    """Keeps the lease of one instance. `on_superseded` is called once if a newer incarnation has the seat.

    Renews every third of the TTL, counted from fixed points in time, and registers again when the registry
    does not know the lease. `client` stays the caller's to close.
    """

    def __init__(
        self, client: ControlClient, instance: Instance, *, on_superseded: Callable[[], None]
    ) -> None:
        self._client = client
        self._instance = instance
        self._state: InstanceState = "ready"
        self._on_superseded = on_superseded
        self._period_s = _FIRST_PERIOD_S
        self._known = False
        self._heard = True
        self._over = False
        self._task: asyncio.Task[None] | None = None
        self._first = asyncio.Event()

    def start(self) -> None:
        """Register, and keep the lease from now on."""
        self._task = asyncio.get_running_loop().create_task(self._keep(), name="registrar")

    async def registered(self, deadline_s: float) -> bool:
        """Wait until the registry has taken the lease once; False when the deadline passed first."""
        try:
            async with asyncio.timeout(deadline_s):
                await self._first.wait()
        except TimeoutError:
            return False
        return True

    async def set_state(self, state: InstanceState, deadline_s: float = _DEADLINE_S) -> bool:
        """Tell the registry now; True when it has heard. Each renewal repeats it in any case."""
        self._state = state
        return await self._say(self._patience_s(deadline_s))

    async def update(self, instance: Instance, deadline_s: float = _DEADLINE_S) -> bool:
        """The same incarnation has changed: register it anew; True when the registry has heard."""
        self._instance = instance
        self._known = False
        return await self._say(self._patience_s(deadline_s))

    async def leave(self, reason: str, deadline_s: float = _DEADLINE_S) -> None:
        """Give the lease back and stop; a registry that does not answer lets it expire."""
        await self.close()
        call = Leave(id=self._instance.id, incarnation=self._instance.incarnation, reason=reason)
        try:
            await self._client.call("registry.leave", call, LeaseReply, self._patience_s(deadline_s))
        except DynctlError as error:
            logger.info("lease.leave_unheard id=%s error=%s", self._instance.id, error)

    async def close(self) -> None:
        """Stop renewing without a word."""
        self._over = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._over:
            await self._say(min(_DEADLINE_S, max(self._period_s, 0.2)))
            due = max(due + self._period_s, loop.time())
            await asyncio.sleep(due - loop.time())

    def _patience_s(self, deadline_s: float) -> float:
        """A registry that was away a moment ago is not waited for: nobody is the wiser for it."""
        return deadline_s if self._heard else min(deadline_s, _AWAY_DEADLINE_S)

    async def _say(self, deadline_s: float) -> bool:
        """Renew, or register when the lease is not known; True when the registry has heard."""
        try:
            outcome = "unknown"
            if self._known:
                outcome = await self._renew(deadline_s)
            if outcome == "unknown" and not self._over:
                outcome = await self._register(deadline_s)
        except DynctlError as error:
            log = logger.debug if isinstance(error, TransportError) else logger.warning
            log("lease.unheard id=%s error=%s", self._instance.id, error)
            self._heard = False
            return False
        self._heard = True
        if outcome == "superseded" and not self._over:
            self._over = True
            logger.warning(
                "lease.superseded id=%s incarnation=%d", self._instance.id, self._instance.incarnation
            )
            self._on_superseded()
        return outcome == "ok"

    async def _renew(self, deadline_s: float) -> str:
        call = Renew(id=self._instance.id, incarnation=self._instance.incarnation, state=self._state)
        reply = await self._client.call("registry.renew", call, LeaseReply, deadline_s)
        self._known = reply.outcome == "ok"
        return reply.outcome

    async def _register(self, deadline_s: float) -> str:
        call = Register(instance=self._instance, state=self._state)
        reply = await self._client.call("registry.register", call, LeaseReply, deadline_s)
        self._known = reply.outcome == "ok"
        if self._known:
            self._period_s = reply.ttl_s / 3
            self._first.set()
            logger.info("lease.taken id=%s ttl_s=%g", self._instance.id, reply.ttl_s)
        return reply.outcome


class Watcher:
    """Follows the membership. `on_change(upserts, removed)`: `removed` is to be applied first. `on_wanted` is
    told how many replicas of each role there should be, `on_planned` what the planner tells.

    `client` is a control client of the registry and stays the caller's to close; `endpoint` is where the
    registry publishes. Make it inside a running loop.
    """

    def __init__(
        self,
        keys: Keys,
        client: ControlClient,
        endpoint: str,
        *,
        on_change: Callable[[list[Member], list[str]], None],
        on_wanted: Callable[[Mapping[str, int]], None] | None = None,
        on_planned: Callable[[PlannerFigures], None] | None = None,
    ) -> None:
        self._client = client
        self._on_change = on_change
        self._on_wanted = on_wanted
        self._on_planned = on_planned
        self._view = MembershipView()
        self._decoder = msgspec.msgpack.Decoder(MembershipChange)
        self._wanted = asyncio.Event()
        self._synced = asyncio.Event()
        self._complete = asyncio.Event()
        topics = (MEMBERSHIP, PLANNER_TOPIC) if on_planned is not None else (MEMBERSHIP,)
        self._subscriber = Subscriber(keys, self._receive, topics)
        self._subscriber.connect(endpoint)
        self._task: asyncio.Task[None] | None = None

    @property
    def members(self) -> list[Member]:
        """The last view."""
        return list(self._view.members.values())

    def start(self) -> None:
        """Ask for the membership, the subscription being made already, and follow it."""
        self._task = asyncio.get_running_loop().create_task(self._sync(), name="watcher")

    async def synced(self, deadline_s: float, *, complete: bool = False) -> bool:
        """Wait until the registry has answered once; False when the deadline passed first.

        `complete`: with all that live, which one that has just started cannot.
        """
        try:
            async with asyncio.timeout(deadline_s):
                await (self._complete if complete else self._synced).wait()
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Stop following."""
        self._subscriber.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    def _receive(self, topic: bytes, body: bytes) -> None:
        if topic == PLANNER_TOPIC:
            self._planned(body)
            return
        try:
            change = self._decoder.decode(body)
        except msgspec.DecodeError as error:
            logger.warning("membership.malformed error=%s", error)
            return
        changes = self._view.change(change)
        if self._view.stale:
            self._wanted.set()
        self._tell(changes)

    def _planned(self, body: bytes) -> None:
        try:
            figures = msgspec.msgpack.decode(body, type=PlannerFigures)
        except msgspec.DecodeError as error:
            logger.warning("planner.malformed error=%s", error)
            return
        if self._on_planned is not None:
            self._on_planned(figures)

    async def _sync(self) -> None:
        """Ask whenever the view is stale, and again while the registry's own is incomplete."""
        while True:
            try:
                whole = await self._client.call("registry.members", GetMembers(), Membership, _DEADLINE_S)
            except DynctlError as error:
                logger.debug("membership.unheard error=%s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            changes = self._view.whole(whole)
            self._synced.set()
            if whole.complete:
                self._complete.set()
            logger.info("membership.synced members=%d complete=%s", len(self._view.members), whole.complete)
            self._tell(changes)
            if self._on_wanted is not None and whole.wanted:
                self._on_wanted(whole.wanted)
            if not self._view.stale:
                self._wanted.clear()
            await self._sleep_until_wanted(None if whole.complete else _SYNC_PERIOD_S)

    def _tell(self, changes: Changes) -> None:
        if not changes:
            return
        try:
            self._on_change(list(changes.upserts), list(changes.removed))
        except Exception:
            # The listener's own failure, at the top of a task: it must not end the watching.
            logger.exception("membership.listener_failed")

    async def _sleep_until_wanted(self, limit_s: float | None) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._wanted.wait()
        except TimeoutError:
            return
