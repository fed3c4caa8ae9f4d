"""Leases: expiry, incarnations, recovery."""

from __future__ import annotations

from dynctl.discovery.lease import NO_CHANGES, Changes, LeaseTable
from dynctl.protocol.instances import Instance
from dynctl.protocol.registry import LeaseReply, Member
from tests.workers import worker_instance

OK = LeaseReply(outcome="ok", ttl_s=10)
UNKNOWN = LeaseReply(outcome="unknown")
SUPERSEDED = LeaseReply(outcome="superseded")


def instance(incarnation: int = 1, seat: str = "decode-0", url: str = "http://a:1") -> Instance:
    return worker_instance(id=seat, incarnation=incarnation, role="decode", url=url)


def member(incarnation: int = 1, seat: str = "decode-0") -> Member:
    return Member(instance=instance(incarnation, seat), state="ready")


def table() -> LeaseTable:
    return LeaseTable(10, now=0)


def test_registered_is_a_member_until_its_lease_ends() -> None:
    leases = table()
    assert leases.register(instance(), "ready", 0) == (OK, Changes(upserts=(member(),)))
    assert leases.members() == [member()]
    assert leases.expire(9.9) == NO_CHANGES
    assert leases.expire(10) == Changes(removed=("decode-0",))
    assert leases.members() == []


def test_renewal_keeps_the_lease() -> None:
    leases = table()
    leases.register(instance(), "ready", 0)
    assert leases.renew("decode-0", 1, "ready", 9) == (OK, NO_CHANGES)
    assert leases.expire(18) == NO_CHANGES
    assert leases.expire(19) == Changes(removed=("decode-0",))


def test_renewal_of_a_lost_lease_is_unknown_and_it_may_register_again() -> None:
    leases = table()
    leases.register(instance(), "ready", 0)
    leases.expire(10)
    assert leases.renew("decode-0", 1, "ready", 11) == (UNKNOWN, NO_CHANGES)
    assert leases.register(instance(), "ready", 11)[0] == OK


def test_draining_is_a_change_and_stays_a_member() -> None:
    leases = table()
    leases.register(instance(), "ready", 0)
    draining = Member(instance=instance(), state="draining")
    assert leases.renew("decode-0", 1, "draining", 1) == (OK, Changes(upserts=(draining,)))
    assert leases.renew("decode-0", 1, "draining", 2) == (OK, NO_CHANGES)


def test_registering_the_same_twice_changes_nothing() -> None:
    leases = table()
    leases.register(instance(), "ready", 0)
    assert leases.register(instance(), "ready", 5) == (OK, NO_CHANGES)
    assert leases.expire(12) == NO_CHANGES


def test_registering_with_a_new_address_is_an_upsert_only() -> None:
    leases = table()
    leases.register(instance(), "ready", 0)
    moved = instance(url="http://b:1")
    _, changes = leases.register(moved, "ready", 1)
    assert changes == Changes(upserts=(Member(instance=moved, state="ready"),))


def test_newer_incarnation_replaces_the_older_one() -> None:
    leases = table()
    leases.register(instance(1), "ready", 0)
    _, changes = leases.register(instance(2), "ready", 1)
    assert changes == Changes(upserts=(member(2),), removed=("decode-0",))


def test_older_incarnation_is_superseded_in_everything() -> None:
    leases = table()
    leases.register(instance(2), "ready", 0)
    assert leases.register(instance(1), "ready", 1) == (SUPERSEDED, NO_CHANGES)
    assert leases.renew("decode-0", 1, "ready", 1) == (SUPERSEDED, NO_CHANGES)
    assert leases.leave("decode-0", 1) == (SUPERSEDED, NO_CHANGES)
    assert leases.members() == [member(2)]


def test_older_incarnation_stays_superseded_when_the_newer_one_has_gone() -> None:
    leases = table()
    leases.register(instance(2), "ready", 0)
    leases.expire(10)
    assert leases.register(instance(1), "ready", 11)[0] == SUPERSEDED


def test_incarnation_set_by_the_controller_ends_an_older_lease() -> None:
    leases = table()
    leases.register(instance(1), "ready", 0)
    assert leases.set_current("decode-0", 2) == Changes(removed=("decode-0",))
    assert leases.renew("decode-0", 1, "ready", 1)[0] == SUPERSEDED
    assert leases.set_current("decode-0", 2) == NO_CHANGES


def test_incarnation_set_before_anyone_came_refuses_an_old_one_that_reappears() -> None:
    leases = table()
    assert leases.set_current("decode-0", 5) == NO_CHANGES
    assert leases.register(instance(4), "ready", 0)[0] == SUPERSEDED
    assert leases.register(instance(5), "ready", 0)[0] == OK


def test_current_incarnation_never_falls() -> None:
    leases = table()
    leases.set_current("decode-0", 5)
    leases.set_current("decode-0", 3)
    assert leases.register(instance(4), "ready", 0)[0] == SUPERSEDED


def test_renewal_of_an_incarnation_nobody_heard_of_is_unknown() -> None:
    leases = table()
    leases.register(instance(1), "ready", 0)
    assert leases.renew("decode-0", 2, "ready", 1) == (UNKNOWN, NO_CHANGES)


def test_leaving_ends_the_lease_once() -> None:
    leases = table()
    leases.register(instance(1), "ready", 0)
    assert leases.leave("decode-0", 1) == (OK, Changes(removed=("decode-0",)))
    assert leases.leave("decode-0", 1) == (UNKNOWN, NO_CHANGES)


def test_recovering_lasts_one_ttl() -> None:
    leases = LeaseTable(10, now=100)
    assert leases.recovering(109.9)
    assert not leases.recovering(110)


def test_members_are_sorted() -> None:
    leases = table()
    for seat in ("b", "a", "c"):
        leases.register(instance(seat=seat), "ready", 0)
    assert [m.instance.id for m in leases.members()] == ["a", "b", "c"]


def test_a_lease_is_late_from_half_its_time_and_ends_then_only_where_its_holder_is_known_gone() -> None:
    leases = LeaseTable(10, now=0)
    for seat, at in (("a", 0), ("b", 0), ("c", 3)):
        leases.register(instance(seat=seat), "ready", at)
    assert leases.late(4.9) == frozenset()
    assert leases.late(5) == {"a", "b"}
    assert leases.expire(5) == NO_CHANGES
    assert leases.expire(5, gone=["b", "c"]) == Changes(removed=("b",))
    assert [m.instance.id for m in leases.members()] == ["a", "c"], "c has renewed in time"
