"""A reader's view of the membership, kept by numbered changes. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from dynctl.discovery.lease import NO_CHANGES, Changes
from dynctl.protocol.registry import Member, Membership, MembershipChange

_KEPT = 10_000
"""Changes kept while a `Membership` is on its way."""


class MembershipView:
    """Members by id. `stale`: ask for the whole `Membership`; until it is there nothing is dropped."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.stale = True
        self.complete = False
        self._epoch = -1
        self._seq = -1
        self._kept: list[MembershipChange] = []

    def change(self, change: MembershipChange) -> Changes:
        """A change was published. What does not follow on makes the view stale, and is kept for later."""
        if self.stale:
            self._keep(change)
            return NO_CHANGES
        if change.epoch != self._epoch:
            if change.epoch < self._epoch:
                return NO_CHANGES
            return self._miss(change)
        if change.seq <= self._seq:
            return NO_CHANGES
        beat = not change.upserts and not change.removed
        if beat or change.seq != self._seq + 1:
            return self._miss(change)
        self._seq = change.seq
        return self._apply(change.upserts, change.removed)

    def whole(self, membership: Membership) -> Changes:
        """The registry's answer. An incomplete one only adds; changes that were kept follow on it."""
        kept, self._kept = self._kept, []
        self.stale = False
        self.complete = membership.complete
        self._epoch, self._seq = membership.epoch, membership.seq
        listed = {member.instance.id for member in membership.members}
        gone = [seat for seat in self.members if seat not in listed] if membership.complete else []
        changes = self._apply(membership.members, gone)
        for change in kept:
            changes = _joined(changes, self.change(change))
        return changes

    def _miss(self, change: MembershipChange) -> Changes:
        self.stale = True
        self._keep(change)
        return NO_CHANGES

    def _keep(self, change: MembershipChange) -> None:
        self._kept.append(change)
        del self._kept[:-_KEPT]

    def _apply(self, upserts: Iterable[Member], removed: Iterable[str]) -> Changes:
        gone = [seat for seat in removed if self.members.pop(seat, None) is not None]
        fresh: list[Member] = []
        for member in upserts:
            seat, incarnation = member.instance.id, member.instance.incarnation
            old = self.members.get(seat)
            if old == member or (old is not None and old.instance.incarnation > incarnation):
                continue
            if old is not None and old.instance.incarnation != incarnation:
                gone.append(seat)
            self.members[seat] = member
            fresh.append(member)
        return Changes(upserts=tuple(fresh), removed=tuple(gone))


def _joined(first: Changes, second: Changes) -> Changes:
    """Both, one after the other, as one: the last word on each id counts."""
    upserts = {
        member.instance.id: member for member in first.upserts if member.instance.id not in second.removed
    }
    upserts.update({member.instance.id: member for member in second.upserts})
    removed = dict.fromkeys((*first.removed, *second.removed))
    return Changes(upserts=tuple(upserts.values()), removed=tuple(removed))
