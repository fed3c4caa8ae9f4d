"""Circuits: what opens one, what must not, and how it closes again."""

from __future__ import annotations

import pytest

from dynctl.errors import ConnectFailed, DeadlineExceeded, DynctlError, EngineFailed, Overloaded, Rejected
from dynctl.frontend.circuit import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, PROBE_S, Circuits

LOST = ConnectFailed("gone")
LATE = DeadlineExceeded("late")
BROKEN = EngineFailed("500")


def circuits(workers: int = 4) -> Circuits:
    made = Circuits()
    made.members_changed({f"w{i}": "decode" for i in range(workers)})
    return made


def test_a_lost_connection_opens_at_once_and_other_failures_only_in_a_row() -> None:
    some = circuits()
    assert some.failed("w0", LOST, 1.0, 0.0)
    for number in range(FAILURES):
        assert some.avoided(1.0) == {"w0"}
        assert some.failed("w1", BROKEN, 1.0, 0.0) is (number == FAILURES - 1)
    assert some.avoided(1.0) == {"w0", "w1"}


def test_an_answer_in_between_ends_the_row() -> None:
    some = circuits()
    for _ in range(FAILURES):
        assert not some.failed("w0", BROKEN, 1.0, 0.0)
        some.answered("w0", 1.0)
    assert not some.avoided(1.0)


@pytest.mark.parametrize("refusal", [Overloaded("429"), Rejected("503")])
def test_a_storm_of_refusals_opens_nothing(refusal: DynctlError) -> None:
    some = circuits()
    for number in range(1000):
        assert not some.failed(f"w{number % 4}", refusal, 1.0, 0.0)
    assert not some.avoided(1.0)


def test_deadlines_missed_under_load_open_nothing_but_silence_does() -> None:
    some = circuits()
    some.answered("w0", 95.0)
    for _ in range(FAILURES):
        assert not some.failed("w0", LATE, 100.0, 60.0)
        some.failed("w1", LATE, 100.0, 60.0)
    assert some.avoided(100.0) == {"w1"}


@pytest.mark.parametrize(("workers", "most"), [(1, 0), (2, 1), (3, 1), (8, 4)])
def test_at_most_half_of_a_role_is_open_and_never_the_last(workers: int, most: int) -> None:
    some = circuits(workers)
    for index in range(workers):
        some.failed(f"w{index}", LOST, 1.0, 0.0)
    assert len(some.avoided(1.0)) == most


def test_another_role_has_its_own_share() -> None:
    some = Circuits()
    some.members_changed({"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"})
    for worker in ("p0", "d0"):
        assert some.failed(worker, LOST, 1.0, 0.0)


def test_half_open_lets_one_probe_through_at_a_time() -> None:
    some = circuits()
    some.failed("w0", LOST, 0.0, 0.0)
    now = FIRST_PAUSE_S
    assert some.states(now)["w0"] == "half_open"
    assert not some.avoided(now)
    some.sent("w0", now)
    assert some.avoided(now) == {"w0"}
    assert not some.avoided(now + PROBE_S), "a probe that was cancelled never tells"


def test_a_probe_that_fails_waits_longer_each_time_up_to_a_limit() -> None:
    some = circuits()
    some.failed("w0", LOST, 0.0, 0.0)
    now, pauses = FIRST_PAUSE_S, []
    for _ in range(8):
        some.sent("w0", now)
        some.failed("w0", LOST, now, 0.0)
        start = now
        while some.avoided(now):
            now += 0.5
        pauses.append(now - start)
    assert pauses == [4.0, 8.0, 16.0, 32.0] + [LONGEST_PAUSE_S] * 4


def test_a_probe_that_is_answered_closes_it() -> None:
    some = circuits()
    some.failed("w0", LOST, 0.0, 0.0)
    some.sent("w0", FIRST_PAUSE_S)
    some.answered("w0", FIRST_PAUSE_S)
    assert some.states(FIRST_PAUSE_S)["w0"] == "closed"
    assert some.opened["w0"] == 1


def test_failures_of_requests_sent_before_do_not_lengthen_the_pause() -> None:
    some = circuits()
    some.failed("w0", LOST, 0.0, 0.0)
    for _ in range(50):
        some.failed("w0", LOST, 0.1, 0.0)
    assert not some.avoided(FIRST_PAUSE_S)


def test_who_leaves_or_comes_anew_is_forgotten() -> None:
    some = circuits(2)
    some.failed("w0", LOST, 0.0, 0.0)
    some.members_changed({"w1": "decode"})
    assert "w0" not in some.states(0.0)
    some.members_changed({"w0": "decode", "w1": "decode"})
    some.failed("w1", LOST, 0.0, 0.0)
    some.forget("w1")
    assert not some.avoided(0.0)
