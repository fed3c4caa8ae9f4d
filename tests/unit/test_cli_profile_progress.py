"""The progress of a measuring profile run: what is left, on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.console import Console

from dynctl.cli.profile_progress import Progress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def shown(progress: Progress) -> str:
    """The bars as they stand, without colours."""
    assert progress._bars is not None
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as taken:
        console.print(progress._bars.drawn.get_renderable())
    return taken.get()


def terminal() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=100), out


def test_the_time_left_is_judged_by_steps_that_took_minutes() -> None:
    console, _ = terminal()
    clock = Clock()
    with Progress(1800.0, console, clock) as progress:
        progress.begin("TP2", 8)
        assert "waiting for GPUs" in shown(progress)
        clock.now_s += 120
        progress.step("TP2", "prefill 1024", done=True)
        clock.now_s += 120
        progress.step("TP2", "decode 16 x 3150", done=True)
        budget, row = shown(progress).splitlines()[:2]
    assert "26m00s left" in budget
    assert "2/8" in row
    assert "~12m00s left" in row
    assert "decode 16 x 3150" in row


def test_a_trial_takes_as_long_as_its_requests_come_not_as_its_start_took() -> None:
    console, _ = terminal()
    clock = Clock()
    with Progress(600.0, console, clock) as progress:
        progress.begin("confirm 2 x TP1", 3)
        clock.now_s += 120
        progress.step("confirm 2 x TP1", "330 requests at 10/s", done=True, lasts_s=33.0)
        clock.now_s += 10
        assert "~23s left" in shown(progress)


def test_a_row_that_died_stays_where_it_was_and_says_why() -> None:
    console, _ = terminal()
    clock = Clock()
    with Progress(60.0, console, clock) as progress:
        progress.begin("TP4 [bold]", 7)
        clock.now_s += 31
        progress.step("TP4 [bold]", "starting")
        progress.end("TP4 [bold]", "exit code 1 [/x]")
        clock.now_s += 300
        text = shown(progress)
    assert "TP4 [bold]" in text
    assert "0/7" in text
    assert "took 31s" in text
    assert "exit code 1 [/x]" in text
    assert "0s left" in text, "a budget that is used up is not below nothing"


def test_a_row_begun_anew_is_there_once() -> None:
    console, _ = terminal()
    with Progress(60.0, console, Clock()) as progress:
        progress.begin("TP2", 3)
        progress.step("TP2", "a", done=True)
        progress.begin("TP2", 5)
        text = shown(progress)
    assert text.count("TP2") == 1
    assert "0/5" in text


def test_an_error_gives_the_terminal_back() -> None:
    console, out = terminal()
    with contextlib.suppress(KeyboardInterrupt), Progress(60.0, console, Clock()) as progress:
        progress.begin("TP2", 3)
        raise KeyboardInterrupt
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor is back"


def test_a_log_gets_lines_and_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Progress(1800.0, clock=clock) as progress:
        progress.begin("TP2", 2)
        progress.step("TP2", "starting")
        clock.now_s += 65
        progress.step("TP2", "prefill 1024", done=True)
        progress.end("TP2", "")
    assert capsys.readouterr() == (
        "",
        "0s  TP2: 2 to measure\n1m05s  TP2: prefill 1024, 1 of 2\n1m05s  TP2: done, took 1m05s\n",
    )
