"""`dynctl bench` and `dynctl compare` as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.cli.main import dispatch
from tests.deployment import RECIPES, ROOT, Cli, Deployment, end_all, eventually, owned, up

QUICKSTART = RECIPES / "quickstart.yaml"
SMALL = ("-n", "12", "--warmup", "4", "-c", "4", "--isl", "60", "--osl", "8")


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("bench") / "home"
    try:
        with up(Cli(home), QUICKSTART, "--set", "frontend.port=0") as deployment:
            yield deployment
    finally:
        end_all(home)


def recipe(folder: Path, name: str, replicas: int, more: str = "") -> Path:
    """Simulated engines on free ports."""
    text = f"""
schema: dynctl/v1
name: {name}
model: {{path: "builtin:tiny", served_name: tiny}}
backend: mocker
roles: {{aggregated: {{replicas: {replicas}}}}}
frontend: {{host: 127.0.0.1, port: 0}}
{more}
"""
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


def told(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_deployment_is_measured_with_its_own_tokenizer(served: Deployment, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.csv", tmp_path / "out.json"
    found = served.cli.json("bench", *SMALL, "--seed", "7", "--csv", str(rows), "--out", str(out))
    assert (found["target"], found["model"], found["seed"]) == ("quickstart", "tiny", 7)
    assert found["counts"]["completed"] == 12
    assert found["input_tokens"]["min"] == found["input_tokens"]["max"] == 60
    assert found["output_tokens"]["mean"] == 8
    assert json.loads(out.read_text()) == found
    written = list(csv.DictReader(rows.read_text().splitlines()))
    assert len(written) == 16
    assert sum(row["warmup"] == "1" for row in written) == 4
    assert all(row["finish"] == "length" for row in written)


def test_people_get_a_table_and_the_next_step(served: Deployment) -> None:
    done = served.cli.run("bench", "quickstart", *SMALL, "--sla", "ttft=5s,itl=1s,percentile=p50")
    assert done.returncode == 0, told(done)
    assert done.stdout.splitlines()[0].startswith("quickstart  chat  4 in flight  60 tokens in  8 out  seed ")
    for word in ("TTFT", "TPOT", "ITL", "E2E", "requests", "goodput", "TTFT ≤ 5.0s, ITL ≤ 1.0s for 50%: met"):
        assert word in done.stdout
    assert "next:" in done.stderr or "not to be relied on" in done.stderr


def test_a_url_is_measured_at_a_rate(served: Deployment) -> None:
    load = ("--rate", "30", "--burstiness", "constant", "--duration", "1s", "--warmup", "0")
    found = served.cli.json("bench", served.url, *load, "--isl", "60", "--osl", "4", "--api", "completions")
    assert found["counts"]["offered"] == 31
    assert found["load"]["arrivals"] == {"type": "open", "rate": 30.0, "burstiness": None}
    assert found["url"] == served.url


def test_a_trace_is_replayed(served: Deployment, tmp_path: Path) -> None:
    lines = [
        {"timestamp": n * 100, "input_length": 600, "output_length": 3, "hash_ids": [1, n]} for n in range(9)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = served.cli.json("bench", "--trace", str(path), "--speedup", "2")
    assert (found["counts"]["completed"], found["load"]["arrivals"]["requests"]) == (9, 9)
    assert found["cached"] > 0.3
    path.write_text(path.read_text() + '{"timestamp": }\n')
    done = served.cli.run("bench", "--trace", str(path))
    assert done.returncode == 1
    assert f"{path}:10: no request of a trace" in told(done)


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--isl", "0"], 2, "prompts need at least 1 token, not 0"),
        (["--osl", "0"], 2, "answers need at least 1 token"),
        (["--rate", "-1"], 2, "a rate must be above 0, not -1"),
        (["-c", "0"], 2, "a concurrency of 0"),
        (["-n", "0"], 2, "--requests must be at least 1"),
        (["--rate", "1", "-c", "2"], 2, "--concurrency and --rate are different loads"),
        (["--burstiness", "2"], 2, "--burstiness is of the gaps that --rate makes"),
        (["--rate", "1", "--burstiness", "x"], 2, "--burstiness x is no number"),
        (["--api", "soap"], 2, "--api soap is not known"),
        (["--sla", "ttft=0s"], 2, "must be above 0"),
        (["--sla", "ttft=1s,ttft=2s"], 2, "ttft is given twice"),
        (["--sla", "speed=9"], 2, "'speed' is no part of an SLA"),
        (["--sla", "percentile=p95"], 2, "neither ttft nor itl"),
        (["--sla", "itl=1ms,percentile=p100"], 2, "between p0 and p100"),
        (["--model", "other"], 2, "no model 'other' is served (there are: tiny)"),
        (["--tokenizer", "/nowhere"], 2, "no tokenizer.json for '/nowhere'"),
        (["--api-key-file", "/nowhere"], 2, "the API key cannot be read"),
        (["--trace", "/nowhere"], 1, "cannot read the trace"),
        (["--csv", "/nowhere/x.csv"], 1, "/nowhere: there is no such directory"),
        (["--isl", "100000"], 9, "maximum context length"),
        (["http://127.0.0.1:9"], 8, "cannot connect"),
        (["ftp://x"], 2, "not a URL"),
        (["nobody"], 2, "no deployment 'nobody'"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_message(
    served: Deployment,
    args: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(served.cli.home))
    assert dispatch(["bench", *args]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("error: ") == 1
    assert shown.out == ""


def test_a_full_disk_does_not_take_the_result_with_it(served: Deployment) -> None:
    done = served.cli.run("bench", *SMALL, "--out", "/dev/full")
    assert done.returncode == 1
    assert "12 of 12 completed" in done.stdout
    assert "/dev/full: cannot be written: No space left on device" in done.stderr


def test_ctrl_c_shows_what_was_measured(served: Deployment) -> None:
    argv = [
        sys.executable,
        "-m",
        "dynctl.cli.main",
        "bench",
        "--duration",
        "100s",
        "--isl",
        "60",
        "--osl",
        "8",
    ]
    process = subprocess.Popen(
        [*argv, "--json", "--warmup", "0"],
        cwd=ROOT,
        env={**os.environ, "DYNCTL_HOME": str(served.cli.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    found = json.loads(out)
    assert found["counts"]["completed"] > 0
    assert "it was stopped" in str(found["problems"])


def test_a_key_is_asked_for_and_read_from_the_environment_or_a_file(cli: Cli, tmp_path: Path) -> None:
    keyed = recipe(tmp_path, "keyed", 1).read_text().replace("port: 0}", "port: 0, api_key: secret-key-1}")
    path = tmp_path / "keyed.yaml"
    path.write_text(keyed)
    (tmp_path / "key").write_text("secret-key-1\n")
    with up(cli, path):
        refused = cli.run("bench", *SMALL)
        assert refused.returncode == 9
        assert "status 401" in told(refused)
        assert cli.json("bench", *SMALL, "--api-key-file", str(tmp_path / "key"))["counts"]["completed"] == 12
        known = Cli(cli.home, {"DYNCTL_API_KEY": "secret-key-1"})
        found = known.run("bench", *SMALL, "--json")
        assert found.returncode == 0, told(found)
        assert "secret-key-1" not in told(found)


def test_two_recipes_are_measured_and_ended(cli: Cli, tmp_path: Path) -> None:
    slow = "engine: {args: {speedup: 0.01}}"
    pair = [recipe(tmp_path, "fast", 1), recipe(tmp_path, "slow", 2, slow)]
    args = [
        "-n",
        "24",
        "-c",
        "4",
        "--warmup",
        "2",
        "--isl",
        "60",
        "--osl",
        "2",
        "--sla",
        "ttft=300ms,percentile=p50",
    ]
    found: dict[str, Any] = cli.json("compare", *map(str, pair), *args, timeout_s=110)
    assert (found["a"]["target"], found["b"]["target"]) == ("fast.yaml", "slow.yaml")
    assert (found["a"]["meets"], found["b"]["meets"]) == ("yes", "no")
    assert found["a"]["load"] == found["b"]["load"]
    if found["a"]["valid"] and found["b"]["valid"]:
        assert (found["winner"], found["verdict"]) == ("a", "fast.yaml keeps the SLA, slow.yaml does not")
    assert found["rows"][0]["better"] == "a"
    assert {row["phase"] for row in cli.json("ls")} == {"stopped"}


def test_one_that_does_not_start_ends_the_comparison_with_its_reason(cli: Cli, tmp_path: Path) -> None:
    broken = recipe(
        tmp_path, "broken", 1, 'engine: {args: {fault-die-at-start: "no memory left on the device"}}'
    )
    done = cli.run("compare", str(recipe(tmp_path, "sound", 1)), str(broken), *SMALL, "--json", timeout_s=110)
    assert done.returncode == 5, told(done)
    error = json.loads(done.stdout)["error"]
    assert "no memory left on the device" in error["message"]
    assert not [run.name for run in (cli.home / "runs").glob("[!.]*") if owned(run.name)]


def test_ctrl_c_in_the_middle_of_a_start_leaves_nothing_running(cli: Cli, tmp_path: Path) -> None:
    pair = [recipe(tmp_path, name, 1, "engine: {args: {fault-slow-start: 60}}") for name in ("one", "two")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dynctl.cli.main", "compare", *map(str, pair), *SMALL],
        cwd=ROOT,
        env={**os.environ, "DYNCTL_HOME": str(cli.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def engine_runs() -> bool:
        return any(len(owned(run.name)) >= 3 for run in (cli.home / "runs").glob("[!.]*"))

    assert eventually(engine_runs)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    runs = list((cli.home / "runs").glob("[!.]*"))
    assert len(runs) == 1
    assert not owned(runs[0].name)


def test_what_is_none_of_a_recipe_a_url_and_a_deployment_is_refused_before_anything_starts(
    cli: Cli, served: Deployment, tmp_path: Path
) -> None:
    done = cli.run("compare", str(recipe(tmp_path, "sound", 1)), "nothing", *SMALL)
    assert done.returncode == 2
    assert "'nothing' is no recipe, no URL and no deployment that runs" in told(done)
    assert not (cli.home / "runs").exists() or not list((cli.home / "runs").glob("[!.]*"))
    taken = served.cli.run("compare", str(QUICKSTART), "quickstart", *SMALL)
    assert taken.returncode == 2
    assert "a deployment 'quickstart' runs already" in told(taken)
