"""Why a process ended, and what that says about another try."""

from __future__ import annotations

import pytest

from dynctl.controller.verdict import Failure, describe_exit, gives_up, signal_name, signature
from dynctl.protocol.exits import LastWords

WORDS = LastWords(id="w", incarnation=1, kind="launch", message="it broke", lines=[], permanent=True)


def test_last_words_win_over_the_exit_code() -> None:
    failure = describe_exit(1, WORDS, ["from the log"])
    assert failure == Failure("it broke", ("from the log",), told=True, permanent=True, kind="launch")


def test_our_own_verdict_wins_over_everything() -> None:
    failure = describe_exit(-9, WORDS, ["x"], "it hung")
    assert failure == Failure("it hung", ("x",), told=True, permanent=False, kind="not_ready")


@pytest.mark.parametrize(
    ("code", "message", "lines", "told"),
    [
        (3, "exited with code 3", ("x",), True),
        (-9, "killed by SIGKILL", (), False),
        (None, "ended, and only its parent could have seen how", (), False),
    ],
)
def test_without_words_the_code_speaks(
    code: int | None, message: str, lines: tuple[str, ...], told: bool
) -> None:
    assert describe_exit(code, None, ["x"]) == Failure(message, lines, told, permanent=False, kind="exit")


def test_the_same_cause_with_other_numbers_is_the_same() -> None:
    one = describe_exit(1, None, ["at 0xabc: 12 bytes"])
    two = describe_exit(1, None, ["at 0x9: 99 bytes"])
    other = describe_exit(1, None, [])
    assert signature(one) == signature(two) != signature(other)


def test_one_failure_that_worked_before_is_tried_again() -> None:
    failure = describe_exit(1, None, ["x"])
    assert not gives_up(failure, same=True, failed_starts=2, ever_ready=True)
    assert gives_up(failure, same=True, failed_starts=2, ever_ready=False)
    assert gives_up(failure, same=False, failed_starts=5, ever_ready=True)


def test_an_unknown_signal_keeps_its_number() -> None:
    assert signal_name(15) == "SIGTERM"
    assert signal_name(250) == "signal 250"
