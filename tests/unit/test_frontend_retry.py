from __future__ import annotations

from random import Random

from dynctl.errors import ConnectFailed, EngineFailed
from dynctl.frontend.retry import (
    FIRST_PAUSE_S,
    MAX_ATTEMPTS,
    MAX_UNSENT,
    RETRIES_PER_S,
    RETRY_RESERVE,
    RETRY_SHARE,
    AttemptFailed,
    Attempts,
    Budget,
)

BAD = EngineFailed("bad")


def test_pauses_double_are_jittered_and_end() -> None:
    pauses = []
    for seed in range(50):
        attempts = Attempts(Random(seed))
        got = [attempts.note(AttemptFailed(BAD)) for _ in range(MAX_ATTEMPTS)]
        assert got[-1] is None
        pauses.append([pause or 0.0 for pause in got[:-1]])
    for number in range(MAX_ATTEMPTS - 1):
        whole = FIRST_PAUSE_S * 2**number
        column = [row[number] for row in pauses]
        assert all(whole / 2 <= pause <= whole for pause in column)
        assert len(set(column)) > 1


def test_workers_found_dead_leave_the_attempts_at_living_ones() -> None:
    attempts = Attempts(Random(0))
    gone = AttemptFailed(ConnectFailed("refused"))
    assert all(attempts.note(gone) is not None for _ in range(MAX_UNSENT - 1))
    assert attempts.note(AttemptFailed(BAD)) is not None
    assert attempts.note(gone) is None


def test_failed_workers_stay_out_suspects_and_shunned_only_while_there_are_others() -> None:
    attempts = Attempts(Random(0))
    failure = AttemptFailed(BAD, failed=frozenset({"a"}), suspects=frozenset({"b"}))
    attempts.note(failure)
    assert attempts.last is BAD
    assert attempts.exclusions(frozenset({"c"})) == [
        frozenset({"a", "b", "c"}),
        frozenset({"a", "b"}),
        frozenset({"a"}),
    ]


def test_equal_exclusions_are_asked_once() -> None:
    assert Attempts(Random(0)).exclusions(frozenset()) == [frozenset()]
    assert Attempts(Random(0)).exclusions(frozenset({"c"})) == [frozenset({"c"}), frozenset()]


def test_a_storm_may_not_retry_without_end() -> None:
    budget = Budget()
    storm = 10_000
    spent = 0
    for _ in range(storm):
        budget.earn()
        spent += sum(budget.spend(1.0) for _ in range(2))
    assert spent <= RETRY_RESERVE + RETRY_SHARE * storm


def test_what_was_spent_comes_back_with_time_and_is_not_saved_without_end() -> None:
    budget = Budget()
    while budget.spend(1.0):
        pass
    assert not budget.spend(1.0)
    assert budget.spend(1.0 + 1 / RETRIES_PER_S)
    spent = 0
    while budget.spend(1e6):
        spent += 1
    assert spent == RETRY_RESERVE
