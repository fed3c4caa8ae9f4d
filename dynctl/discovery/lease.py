"""Who holds which seat, until when, and which incarnation may. Pure: the time comes with each call.

A seat has at most one lease. Its current incarnation only rises: an older one is told that it is superseded,
whether the newer one still lives or not. Times are in seconds on any clock that does not go back.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dynctl.protocol.instances import Instance
from dynctl.protocol.registry import InstanceState, LeaseReply, Member


@dataclass(frozen=True, slots=True)
class Changes:
    """What a call did to the membership; `removed` is to be applied before `upserts`."""

    upserts: tuple[Member, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.upserts or self.removed)


@dataclass(slots=True)
class _Lease:
    member: Member
    ends_at: float


NO_CHANGES = Changes()


class LeaseTable:
    """The leases of one deployment. `recovering` for one TTL after a (re)start: the living still renew."""

    def __init__(self, ttl_s: float, now: float) -> None:
        self.ttl_s = ttl_s
        self._recovers_at = now + ttl_s
        self._leases: dict[str, _Lease] = {}
        self._current: dict[str, int] = {}

    def members(self) -> list[Member]:
        """All that hold a lease, by id."""
        return [self._leases[seat].member for seat in sorted(self._leases)]

    def recovering(self, now: float) -> bool:
        """Whether some that live may not have been heard of yet."""
        return now < self._recovers_at

    def set_current(self, seat: str, incarnation: int) -> Changes:
        """Declare the incarnation that may hold `seat`; a lease of an older one ends now."""
        self._current[seat] = max(incarnation, self._current.get(seat, incarnation))
        lease = self._leases.get(seat)
        if lease is not None and lease.member.instance.incarnation < self._current[seat]:
            del self._leases[seat]
            return Changes(removed=(seat,))
        return NO_CHANGES

    def register(self, instance: Instance, state: InstanceState, now: float) -> tuple[LeaseReply, Changes]:
        """Give or renew a lease. A newer incarnation replaces an older one: removed, then upserted."""
        if instance.incarnation < self._current.get(instance.id, instance.incarnation):
            return LeaseReply(outcome="superseded"), NO_CHANGES
        replaced = self.set_current(instance.id, instance.incarnation)
        member = Member(instance=instance, state=state)
        old = self._leases.get(instance.id)
        self._leases[instance.id] = _Lease(member, now + self.ttl_s)
        if old is not None and old.member == member:
            return self._ok(), NO_CHANGES
        return self._ok(), Changes(upserts=(member,), removed=replaced.removed)

    def renew(
        self, seat: str, incarnation: int, state: InstanceState, now: float
    ) -> tuple[LeaseReply, Changes]:
        """Renew a lease. "unknown": there is none of that incarnation, the sender should register."""
        if incarnation < self._current.get(seat, incarnation):
            return LeaseReply(outcome="superseded"), NO_CHANGES
        lease = self._leases.get(seat)
        if lease is None or lease.member.instance.incarnation != incarnation:
            return LeaseReply(outcome="unknown"), NO_CHANGES
        lease.ends_at = now + self.ttl_s
        if lease.member.state == state:
            return self._ok(), NO_CHANGES
        lease.member = Member(instance=lease.member.instance, state=state)
        return self._ok(), Changes(upserts=(lease.member,))

    def leave(self, seat: str, incarnation: int) -> tuple[LeaseReply, Changes]:
        """End a lease at its holder's wish, or because its process is known to have ended."""
        if incarnation < self._current.get(seat, incarnation):
            return LeaseReply(outcome="superseded"), NO_CHANGES
        lease = self._leases.get(seat)
        if lease is None or lease.member.instance.incarnation != incarnation:
            return LeaseReply(outcome="unknown"), NO_CHANGES
        del self._leases[seat]
        return self._ok(), Changes(removed=(seat,))

    def late(self, now: float) -> frozenset[str]:
        """Seats whose holder has let a renewal go by: half of the TTL has passed since the last one."""
        latest = now + self.ttl_s / 2
        return frozenset(seat for seat, lease in self._leases.items() if lease.ends_at <= latest)

    def expire(self, now: float, gone: Collection[str] = ()) -> Changes:
        """End all leases that were not renewed in time, and the late ones of seats that are known `gone`."""
        given_up = self.late(now).intersection(gone)
        ended = tuple(sorted(s for s, lease in self._leases.items() if lease.ends_at <= now or s in given_up))
        for seat in ended:
            del self._leases[seat]
        return Changes(removed=ended)

    def excuse(self, deaf_s: float, now: float) -> None:
        """Nobody listened for so long: that time does not count, renewals may wait to be read."""
        for lease in self._leases.values():
            lease.ends_at = min(lease.ends_at + deaf_s, now + self.ttl_s)

    def _ok(self) -> LeaseReply:
        return LeaseReply(outcome="ok", ttl_s=self.ttl_s)
