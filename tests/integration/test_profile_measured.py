"""`dynctl profile` that measures simulated engines: killed, resumed, interrupted, with engines that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.profiler.outcome import FILE, Measurement, load
from tests.deployment import Cli, end_all, eventually, owned
from tests.perf.laws import write_law, write_recipe

ASKED = ("--isl", "600", "--osl", "40", "--sla", "ttft=2s,itl=150ms,percentile=p50", "--rate", "3")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    made = Cli(tmp_path / "home")
    yield made
    end_all(made.home)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for size in (1, 2):
        write_law(tmp_path, size)
    return write_recipe(tmp_path)


def begin(cli: Cli, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dynctl.cli.main", "profile", *args],
        env={**os.environ, "DYNCTL_HOME": str(cli.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def journal(out: Path) -> list[dict[str, Any]]:
    """Whole lines so far."""
    path = out / "journal.jsonl"
    raw = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in raw.splitlines(keepends=True) if line.endswith("\n")]


def finished(out: Path) -> list[str]:
    """Keys of the questions that have their answer."""
    return [line["key"] for line in journal(out) if line["kind"] == "answer" and line.get("found")]


def answered(out: Path) -> list[dict[str, Any]]:
    """Questions that were asked, also those whose answer is not to be relied on."""
    return [line for line in journal(out) if line["kind"] == "answer"]


def running(cli: Cli) -> list[int]:
    runs = [path.name for path in (cli.home / "runs").glob("[!.]*")] if cli.home.exists() else []
    return [pid for run in runs for pid in owned(run)]


@pytest.mark.timeout(240)
def test_after_kill_9_nothing_finished_is_measured_again_and_nothing_is_left(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    args = (str(recipe), *ASKED, "--gpus", "2", "--parallel", "1", "--budget", "3m", "--out", str(out))
    process = begin(cli, *args)
    assert eventually(lambda: len(finished(out)) >= 3, 90.0), process.communicate(timeout=5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = finished(out)
    assert running(cli), "the engine was ended by something else than the next run"
    path = out / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"answer","run":"torn')

    done = cli.run("profile", *args, "--resume", "--json", timeout_s=200.0)
    assert done.returncode in (0, 1), done.stderr
    after = finished(out)
    assert len(set(after)) == len(after), "a finished probe was measured again"
    assert set(before) < set(after)
    told: Measurement = load(out / FILE)
    assert told.reused >= len(before) - 1  # but for what the engine said of its KV
    assert any(point.reused for run in told.layouts for point in run.prefill)
    assert not running(cli)


@pytest.mark.timeout(120)
def test_a_law_that_has_changed_is_measured_again(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (str(recipe), *ASKED, "--gpus", "1", "--budget", "40s", "--out", str(out), "--json")
    first = cli.run("profile", *args, timeout_s=100.0)
    assert first.returncode in (0, 1), first.stderr
    write_law(tmp_path, 1, slower=2.0)
    process = begin(cli, *args, "--resume")
    before = len(answered(out))
    assert eventually(lambda: len(answered(out)) > before, 60.0)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=40.0)
    old, new = answered(out)[:before], answered(out)[before:]
    assert new[0]["what"] == old[0]["what"]
    assert new[0]["key"] not in {line["key"] for line in old}


@pytest.mark.timeout(90)
def test_ctrl_c_ends_what_was_started_and_leaves_a_whole_journal(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = begin(cli, str(recipe), *ASKED, "--gpus", "3", "--budget", "3m", "--out", str(out))
    assert eventually(lambda: bool(finished(out)), 60.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=40.0)
    assert process.returncode == 130, err
    assert "--resume goes on" in err
    assert not running(cli)
    lines = (out / "journal.jsonl").read_text()
    assert lines.endswith("\n")
    started = {line["name"] for line in journal(out) if line["kind"] == "started"}
    assert started == {line["name"] for line in journal(out) if line["kind"] == "ended"}
    assert not list((out / "candidates").iterdir())


@pytest.mark.timeout(90)
def test_ctrl_c_while_an_engine_starts_leaves_nothing(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = ("--set", "engine.args.fault-slow-start=60.0")
    process = begin(cli, str(recipe), *ASKED, *slow, "--gpus", "1", "--budget", "3m", "--out", str(out))
    assert eventually(lambda: bool(running(cli)), 30.0)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=40.0)
    assert process.returncode == 130, err
    assert not running(cli)


@pytest.mark.timeout(120)
def test_after_kill_9_while_an_engine_starts_the_next_run_ends_it(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    slow = ("--set", "engine.args.fault-slow-start=300.0")
    process = begin(cli, str(recipe), *ASKED, *slow, "--gpus", "1", "--out", str(out))
    assert eventually(lambda: bool(running(cli)), 30.0)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = [line["name"] for line in journal(out) if line["kind"] == "started"]
    again = begin(cli, str(recipe), *ASKED, "--gpus", "1", "--budget", "60s", "--out", str(out))
    assert eventually(lambda: bool(answered(out)), 60.0)
    again.send_signal(signal.SIGINT)
    _, err = again.communicate(timeout=40.0)
    assert "ending 1 deployments that an earlier run has left" in err
    ended = [line["name"] for line in journal(out) if line["kind"] == "ended"]
    assert set(first) <= set(ended)
    assert not running(cli)


@pytest.mark.timeout(120)
def test_an_engine_out_of_memory_costs_little_and_is_told_with_its_last_lines(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    """TP2 has no law to start with; TP1 is measured all the same."""
    (tmp_path / "law-tp2.json").write_text("{}")
    estimate = tmp_path / "estimate.json"
    law = json.loads((tmp_path / "law-tp1.json").read_text())
    law["subject"] = {"model": "", "backend": "mocker", "layout": {"tensor": 2}}
    estimate.write_text(json.dumps(law))
    out = tmp_path / "out"
    args = (*ASKED, "--gpus", "2", "--budget", "40s", "--profile", str(estimate), "--out", str(out))
    done = cli.run("profile", str(recipe), *args, "--json", timeout_s=110.0)
    assert done.returncode in (0, 1), done.stderr
    told = load(out / FILE)
    dead = next(run for run in told.layouts if run.layout.tensor == 2)
    assert "aggregated-0" in dead.failure
    assert any("not a profile" in line for line in dead.lines)
    assert dead.took_s < 60.0
    assert any(run.prefill or run.refused for run in told.layouts), "the others went on"
    assert not running(cli)


@pytest.mark.timeout(90)
def test_an_engine_that_dies_while_it_is_measured_is_no_point(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fault = ("--set", "engine.args.fault-crash-after-tokens=8")
    args = (*ASKED, *fault, "--gpus", "1", "--budget", "60s", "--out", str(out))
    done = cli.run("profile", str(recipe), *args, "--json", timeout_s=80.0)
    assert done.returncode == 1, done.stderr
    told = load(out / FILE)
    assert "died while it was measured" in told.layouts[0].failure
    assert told.layouts[0].took_s < 60.0
    assert told.verdict.startswith("nothing could be measured")
    assert not running(cli)


@pytest.mark.timeout(120)
def test_two_runs_at_once_do_not_take_each_others_names_or_ports(
    cli: Cli, recipe: Path, tmp_path: Path
) -> None:
    outs = (tmp_path / "one", tmp_path / "two")
    both = [begin(cli, str(recipe), *ASKED, "--gpus", "1", "--out", str(out)) for out in outs]
    assert eventually(lambda: all(finished(out) for out in outs), 60.0)
    for process in both:
        process.send_signal(signal.SIGINT)
    for process in both:
        _, err = process.communicate(timeout=40.0)
        assert process.returncode == 130, err
    assert not running(cli)


@pytest.mark.timeout(60)
def test_a_second_run_with_the_same_directory_is_refused(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    args = (str(recipe), *ASKED, "--gpus", "1", "--budget", "3m", "--out", str(out))
    process = begin(cli, *args)
    assert eventually(lambda: bool(journal(out)), 30.0)
    done = cli.run("profile", *args)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=40.0)
    assert done.returncode == 2
    assert "another dynctl profile is at work" in done.stderr
    assert not running(cli)
