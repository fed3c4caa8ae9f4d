"""A reader's view: numbered changes, gaps, new epochs, incomplete answers."""

from __future__ import annotations

from dynctl.discovery.lease import NO_CHANGES, Changes
from dynctl.discovery.view import MembershipView
from dynctl.protocol.registry import Member, Membership, MembershipChange
from tests.workers import worker_instance


def member(seat: str, incarnation: int = 1) -> Member:
    instance = worker_instance(id=seat, incarnation=incarnation, role="decode")
    return Member(instance=instance, state="ready")


def whole(*seats: str, seq: int = 0, epoch: int = 1, complete: bool = True) -> Membership:
    return Membership(epoch=epoch, seq=seq, complete=complete, members=[member(s) for s in seats])


def change(
    seq: int, *seats: str, removed: tuple[str, ...] = (), epoch: int = 1, incarnation: int = 1
) -> MembershipChange:
    upserts = [member(s, incarnation) for s in seats]
    return MembershipChange(epoch=epoch, seq=seq, upserts=upserts, removed=list(removed))


def view(*seats: str, seq: int = 0) -> MembershipView:
    made = MembershipView()
    made.whole(whole(*seats, seq=seq))
    return made


def stale(seen: MembershipView) -> bool:
    return seen.stale


def test_changes_in_order_are_applied() -> None:
    seen = view("a")
    assert seen.change(change(1, "b")) == Changes(upserts=(member("b"),))
    assert seen.change(change(2, removed=("a",))) == Changes(removed=("a",))
    assert list(seen.members) == ["b"]
    assert not stale(seen)


def test_changes_before_the_first_answer_follow_on_it() -> None:
    seen = MembershipView()
    assert seen.change(change(1, "old")) == NO_CHANGES
    assert seen.change(change(2, "b")) == NO_CHANGES
    assert seen.change(change(3, removed=("a",))) == NO_CHANGES
    changes = seen.whole(whole("a", "c", seq=1))
    assert changes == Changes(upserts=(member("c"), member("b")), removed=("a",))
    assert set(seen.members) == {"b", "c"}


def test_gap_makes_the_view_stale_and_drops_nothing() -> None:
    seen = view("a")
    assert seen.change(change(2, removed=("a",))) == NO_CHANGES
    assert stale(seen)
    assert list(seen.members) == ["a"]
    assert seen.whole(whole("b", seq=1)) == Changes(upserts=(member("b"),), removed=("a",))
    assert not stale(seen)


def test_gap_behind_the_answer_stays_stale() -> None:
    seen = view("a")
    seen.change(change(5, "x"))
    seen.whole(whole("a", seq=3))
    assert stale(seen)


def test_repeat_is_dropped() -> None:
    seen = view("a", seq=3)
    assert seen.change(change(3, removed=("a",))) == NO_CHANGES
    assert list(seen.members) == ["a"]
    assert not stale(seen)


def test_beat_shows_a_lost_last_change() -> None:
    seen = view("a", seq=3)
    seen.change(change(3))
    assert not stale(seen)
    seen.change(change(4))
    assert stale(seen)


def test_new_epoch_asks_and_an_old_one_is_ignored() -> None:
    seen = MembershipView()
    seen.whole(whole("a", epoch=5))
    seen.change(change(1, removed=("a",), epoch=4))
    assert not stale(seen)
    seen.change(change(1, "b", epoch=6))
    assert stale(seen)
    assert list(seen.members) == ["a"]


def test_incomplete_answer_only_adds() -> None:
    seen = view("a", "b")
    changes = seen.whole(whole("c", epoch=2, complete=False))
    assert changes == Changes(upserts=(member("c"),))
    assert set(seen.members) == {"a", "b", "c"}
    assert not seen.complete
    assert seen.whole(whole("a", "c", epoch=2)) == Changes(removed=("b",))
    assert seen.complete


def test_newer_incarnation_in_an_answer_is_removed_and_upserted() -> None:
    seen = view("a")
    answer = Membership(epoch=1, seq=4, complete=True, members=[member("a", 2)])
    assert seen.whole(answer) == Changes(upserts=(member("a", 2),), removed=("a",))


def test_replacement_in_a_change_is_reported_once() -> None:
    seen = view("a")
    changes = seen.change(change(1, "a", removed=("a",), incarnation=2))
    assert changes == Changes(upserts=(member("a", 2),), removed=("a",))


def test_older_incarnation_never_comes_back() -> None:
    seen = MembershipView()
    seen.whole(Membership(epoch=1, seq=0, complete=True, members=[member("a", 3)]))
    assert seen.change(change(1, "a", incarnation=2)) == NO_CHANGES


def test_upsert_that_a_later_change_removes_is_not_told() -> None:
    seen = MembershipView()
    seen.change(change(2, removed=("b",)))
    assert seen.whole(whole("a", "b", seq=1)) == Changes(upserts=(member("a"),), removed=("b",))
