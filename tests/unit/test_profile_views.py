"""What is shown of a measuring run: bars on a terminal, lines elsewhere, tables at the end."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from dynctl.cli.profile_measured_view import measured_lines
from dynctl.cli.profile_progress import Progress
from dynctl.perfmodel.choice import Choice, Demand, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import DEFAULT
from dynctl.profiler.candidate import alone
from dynctl.profiler.outcome import (
    Confirmed,
    DecodePoint,
    LayoutRun,
    Measurement,
    PrefillPoint,
    Refusal,
    encode,
    load,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def driven(shown: Progress) -> None:
    shown.begin("TP1", 8)
    shown.step("TP1", "starting")
    shown.step("TP1", "prefill 600 measured", done=True)
    shown.end("TP1", "3 + 5 points")


def test_off_a_terminal_there_is_a_line_for_each_thing_done(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(60.0) as shown:
        driven(shown)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "TP1: 8 to measure",
        "TP1: prefill 600 measured, 1 of 8",
        "TP1: 3 + 5 points, took 0s",
    ]


def test_on_a_terminal_there_is_a_bar_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress(60.0) as shown:
        driven(shown)
    assert "TP1" in terminal.getvalue()
    assert "3 + 5 points" in terminal.getvalue()


def found() -> Measurement:
    choice = Choice(
        sla=Sla(ttft_s=1.0, itl_s=0.03), demand=Demand(rate=2.0, lengths=((600, 60),)), chosen=None
    )
    run = LayoutRun(
        layout=Layout(tensor=2),
        estimated=DEFAULT,
        fitted=DEFAULT,
        prefill=(PrefillPoint(isl=600, seconds=0.25, low_s=0.2, high_s=0.3, requests=5),),
        decode=(
            DecodePoint(batch=30, context=630, seconds=0.029, steps=32),
            DecodePoint(batch=40, context=630, seconds=0.033, steps=32),
        ),
        refused=(Refusal(what="prefill 150", reason="the client itself was late"),),
        start_s=63.0,
    )
    dead = LayoutRun(
        layout=Layout(), estimated=DEFAULT, failure="it ended", lines=("CUDA out of memory",), took_s=3.0
    )
    tried = Confirmed(
        option=alone(Layout(tensor=2)),
        rate=2.0,
        requests=300,
        ttft_s=0.4,
        itl_s=0.02,
        attainment=0.97,
        attainment_low=0.95,
        attainment_high=0.98,
        goodput=1.9,
    )
    return Measurement(
        run_id="r",
        name="n",
        model="m",
        backend="mocker",
        at=0.0,
        took_s=300.0,
        budget_s=1800.0,
        estimate=choice,
        choice=choice,
        layouts=(run, dead),
        rounds=(tried,),
        probes=4,
        gpu_s=600.0,
    )


def test_the_table_tells_points_refusals_deaths_and_trials() -> None:
    text = "\n".join(measured_lines(found()))
    assert "TP2     600: 250ms    30: 29.0ms, 40: 33.0ms  30" in text
    assert "TP2 prefill 150 refused: the client itself was late" in text
    assert "TP1: CUDA out of memory" in text
    assert "0.0ms → 400ms" in text
    assert "97.0% (95% to 98%)" in text


def test_what_was_measured_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    path.write_bytes(encode(found()))
    assert load(path) == found()
