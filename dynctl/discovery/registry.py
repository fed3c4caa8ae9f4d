"""The registry: answers "registry.*" calls from a lease table and publishes each change with a number."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping

import msgspec

from dynctl.discovery.lease import Changes, LeaseTable
from dynctl.errors import DiscoveryError
from dynctl.protocol.instances import PROTOCOL_VERSION
from dynctl.protocol.registry import (
    MEMBERSHIP,
    LeaseReply,
    Leave,
    Member,
    Membership,
    MembershipChange,
    Register,
    Renew,
)
from dynctl.transport.control import read_body
from dynctl.transport.event_plane import Publisher

logger = logging.getLogger(__name__)

DEFAULT_TTL_S = 5.0
_TICK_S = 0.5


class Registry:
    """Part of the controller. Give its control server's "registry.*" calls to `handle`.

    Each start is a new epoch. The controller says by `set_current` which incarnation of a seat it started
    (also right after its own restart, from its state file) and by `gone` which it has seen end.
    `on_change` is told of each change after it was published, `on_late` again and again of the seats whose
    holders have let a renewal go by.
    """

    def __init__(
        self,
        publisher: Publisher,
        *,
        ttl_s: float = DEFAULT_TTL_S,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[Changes], None] | None = None,
        on_late: Callable[[frozenset[str]], None] | None = None,
    ) -> None:
        self._publisher = publisher
        self._clock = clock
        self._on_change = on_change
        self._on_late = on_late
        self._table = LeaseTable(ttl_s, clock())
        self._looked_at = clock()
        self._epoch = time.time_ns()
        self._seq = 0
        self._wanted: dict[str, int] = {}
        self._ticker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to end leases that are not renewed, and to repeat the last number for late readers."""
        self._looked_at = self._clock()
        self._ticker = asyncio.get_running_loop().create_task(self._tick(), name="registry")

    async def close(self) -> None:
        """Stop; leases are left as they are."""
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
            self._ticker = None

    def members(self) -> list[Member]:
        """All that hold a lease now."""
        return self._table.members()

    def complete(self) -> bool:
        """False for one TTL after the start, while the living may not have been heard of yet."""
        return not self._table.recovering(self._clock())

    def set_current(self, seat: str, incarnation: int) -> None:
        """From now on only this incarnation of `seat`, or a newer one, may hold its lease."""
        self._publish(self._table.set_current(seat, incarnation))

    def want(self, roles: Mapping[str, int]) -> None:
        """So many replicas of each role there should be. Readers see that they missed a number, and ask."""
        if roles != self._wanted:
            self._wanted = dict(roles)
            self._seq += 1

    def gone(self, seat: str, incarnation: int) -> None:
        """That process has ended: its lease ends now."""
        _, changes = self._table.leave(seat, incarnation)
        self._publish(changes)

    def unreachable(self, seats: Collection[str]) -> None:
        """Their node does not answer: late leases among them end now, the others when they run out."""
        self._expire(seats)

    async def handle(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        """Answer one call. Raises CodecError; DiscoveryError for an op that is none, or another protocol."""
        match op:
            case "registry.register":
                return self._register(read_body(body, Register))
            case "registry.renew":
                renew = read_body(body, Renew)
                reply, changes = self._table.renew(renew.id, renew.incarnation, renew.state, self._clock())
            case "registry.leave":
                leave = read_body(body, Leave)
                reply, changes = self._table.leave(leave.id, leave.incarnation)
                if changes:
                    logger.info("lease.left id=%s reason=%s", leave.id, leave.reason)
            case "registry.members":
                return Membership(
                    epoch=self._epoch,
                    seq=self._seq,
                    complete=self.complete(),
                    members=self.members(),
                    wanted=self._wanted,
                )
            case _:
                raise DiscoveryError(f"unknown op {op!r}", hint="registry.register, renew, leave or members")
        self._publish(changes)
        return reply

    def _register(self, call: Register) -> LeaseReply:
        given = call.instance.protocol
        if given != PROTOCOL_VERSION:
            raise DiscoveryError(
                f"{call.instance.id} speaks protocol {given}, this controller {PROTOCOL_VERSION}",
                where=call.instance.node,
                hint="the same version of dynctl on all machines",
            )
        reply, changes = self._table.register(call.instance, call.state, self._clock())
        self._publish(changes)
        if changes or reply.outcome != "ok":
            logger.info(
                "lease.register id=%s incarnation=%d outcome=%s",
                call.instance.id,
                call.instance.incarnation,
                reply.outcome,
            )
        return reply

    def _publish(self, changes: Changes) -> None:
        if not changes:
            return
        self._seq += 1
        self._publisher.publish(
            MEMBERSHIP,
            MembershipChange(
                epoch=self._epoch,
                seq=self._seq,
                upserts=list(changes.upserts),
                removed=list(changes.removed),
            ),
        )
        if self._on_change is not None:
            self._on_change(changes)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._look()
            except Exception:
                # Top of the task: a listener that breaks must not stop leases from ending.
                logger.exception("registry.tick_failed")

    def _look(self) -> None:
        self._expire(())
        self._publisher.publish(MEMBERSHIP, MembershipChange(epoch=self._epoch, seq=self._seq))
        late = self._table.late(self._clock())
        if late and self._on_late is not None:
            self._on_late(late)

    def _expire(self, gone: Collection[str]) -> None:
        now = self._clock()
        deaf_s, self._looked_at = now - self._looked_at - _TICK_S, now
        if deaf_s > _TICK_S:  # this process was stopped, or waited for a disk
            logger.warning("registry.deaf for_s=%.1f", deaf_s)
            self._table.excuse(deaf_s, now)
        expired = self._table.expire(now, gone)
        for seat in expired.removed:
            logger.warning("lease.expired id=%s", seat)
        self._publish(expired)
