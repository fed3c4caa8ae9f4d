"""How soon an agent that keeps dying is started again."""

from __future__ import annotations

from dynctl.agent.keeper import FIRST_S, MOST_S, STABLE_S, backoff_s


def test_an_agent_that_keeps_dying_is_started_ever_less_often_but_for_ever() -> None:
    waits = [0.0]
    for _ in range(12):
        waits.append(backoff_s(waits[-1], 0.1))
    assert waits[1] == FIRST_S
    assert waits[1:] == sorted(waits[1:])
    assert waits[-1] == MOST_S


def test_one_that_has_lived_well_is_started_at_once_again() -> None:
    assert backoff_s(MOST_S, STABLE_S) == FIRST_S
