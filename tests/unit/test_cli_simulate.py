"""`dynctl simulate`: what it prints for a small trace, and one message for each thing that is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.cli import simulate_process
from dynctl.cli.main import dispatch
from dynctl.cli.simulate_process import Meter, results_of
from dynctl.cli.simulate_view import sparkline
from dynctl.errors import ProfileError
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import DEFAULT, Limits, Subject
from dynctl.perfmodel.simulation import Group, Progress, Service, Task

RECIPE = """\
schema: dynctl/v1
name: small
model: {path: "builtin:tiny"}
backend: mocker
engine:
  args: {num-gpu-blocks-override: 4096}
roles:
  aggregated: {replicas: 2}
sla: {ttft: 1s, itl: 20ms}
"""
PLANNER = """\
planner: {interval: 10, load_interval: 5, boot_time: 10, cooldown: 20, profile: PROFILE}
"""
BIG = Limits(kv_tokens=65_536, sequences=256, batched_tokens=8192)
SHOWN = """\
small  p95 TTFT ≤ 1s, ITL ≤ 20.0ms
240 requests in 59s, on average 2000 prompt and 40 answer tokens

POLICY    MET     TTFT    ITL     TTFT p50/p95/p99   ITL p50/p95/p99    GOODPUT  GPU-H  REFUSED  ABORTED
as it is  100.0%  100.0%  100.0%  131ms 131ms 131ms  7.7ms 7.7ms 7.7ms  4.04/s   0.03   0        0

replicas over 59s, as it is
  aggregated  ████████████████████████████████████████████████████████████  2
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    lines = [
        json.dumps({"timestamp": 1000 * (i // 4), "input_length": 2000, "output_length": 40})
        for i in range(240)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    limits = Limits(kv_tokens=65_536, sequences=256, batched_tokens=8192)
    profile = msgspec.structs.replace(DEFAULT, limits=limits)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile))
    (tmp_path / "planned.yaml").write_text(
        RECIPE + PLANNER.replace("PROFILE", str(tmp_path / "profile.json"))
    )
    return tmp_path


def asked(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = dispatch(["simulate", *args])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_small_trace_is_shown_whole(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = asked(capsys, "recipe.yaml", "--trace", "trace.jsonl")
    assert (code, out) == (0, SHOWN)
    assert "times as fast" in err


def test_the_planner_is_in_the_loop_and_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("planned.yaml", "--trace", "trace.jsonl", "--rate-scale", "6", "--compare", "--json")
    code, out, _ = asked(capsys, *args)
    assert code == 0
    told: dict[str, Any] = json.loads(out)
    assert [run["policy"] for run in told["runs"]] == [
        "planner",
        "static",
        "peak",
        "mean",
        "classic",
        "oracle",
    ]
    for run in told["runs"]:
        assert run["done"] + run["refused"] == told["runs"][0]["requests"] == run["requests"] == 1440
        assert run["aborted"] == 0
    assert told["runs"][-1]["keeps_sla"]
    assert told["runs"][0]["reasons"]
    assert asked(capsys, *args)[1] == out


def test_advice_in_the_recipe_is_carried_out_where_all_is_simulated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("planned.yaml", "--trace", "trace.jsonl", "--rate-scale", "6", "--json")
    once = asked(capsys, *args)
    assert asked(capsys, *args, "--set", "planner.advisory=true") == once


APART = """\
roles:
  prefill: {replicas: 2}
  decode: {replicas: 2}
"""


@pytest.mark.parametrize(
    ("more", "handover_s"),
    [
        ((), 1.5),
        (("--set", "roles.prefill.args.num-gpu-blocks-override=2048"), None),
    ],
    ids=["alike", "other-arguments"],
)
def test_a_handover_takes_no_boot_where_the_recipe_allows_one(
    here: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], handover_s: float | None
) -> None:
    apart = RECIPE.replace("roles:\n  aggregated: {replicas: 2}\n", APART)
    (here / "apart.yaml").write_text(apart)
    code, out, err = asked(capsys, "apart.yaml", "--trace", "trace.jsonl", "--json", *more)
    assert code == 0, err
    assert json.loads(out)["handover_s"] == handover_s


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ({"model": "llama"}, "model llama, not "),
        ({"backend": "vllm"}, "backend vllm, not mocker"),
        ({"hardware": "H100"}, "hardware H100, not H200"),
        ({"layout": Layout(tensor=4)}, "layout TP4, not TP1"),
    ],
)
@pytest.mark.parametrize("given", ["--profile", "planner.profile"])
def test_a_profile_of_something_else_is_refused_with_the_difference(
    here: Path, capsys: pytest.CaptureFixture[str], subject: dict[str, Any], said: str, given: str
) -> None:
    made = Subject(**{"model": "tiny", "backend": "mocker", **subject})
    (here / "other.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(DEFAULT, subject=made, limits=BIG))
    )
    gpu = ("--gpu", "h200_sxm") if "hardware" in subject else ()
    how = ("--profile", "other.json") if given == "--profile" else ("--set", "planner={profile: other.json}")
    code, out, err = asked(capsys, "recipe.yaml", "--trace", "trace.jsonl", *how, *gpu)
    assert (code, out) != (0, "")
    assert said in err
    assert "other.json" in err


def test_speed_and_set_are_heard(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--speed", "2", "--set", "roles.aggregated.replicas=3", "--sla", "ttft=2s", "--json")
    code, out, _ = asked(capsys, "recipe.yaml", "--trace", "trace.jsonl", *args)
    assert code == 0
    told = json.loads(out)
    assert told["sla"] == {"ttft_s": 2.0, "itl_s": 0.02, "percentile": 0.95}
    assert 29.5 < told["runs"][0]["span_s"] < 30.0
    assert told["runs"][0]["presence"] == [
        {"at_s": 0.0, "there": {"aggregated": 3}, "ready": {"aggregated": 3}}
    ]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--trace", "none.jsonl"), 1, "none.jsonl: cannot read the trace: No such file"),
        (("--trace", "broken.jsonl"), 1, "broken.jsonl:2: no request of a trace"),
        (("--trace", "zero.jsonl"), 1, "zero.jsonl:1: 0 prompt and 5 answer tokens"),
        (("--trace", "empty.jsonl"), 1, "empty.jsonl: the trace holds no request"),
        (("--trace", "long.jsonl"), 1, "does not fit into the 65536 KV tokens of one replica (aggregated)"),
        (("--trace", "trace.jsonl", "--unset", "sla"), 2, "no service level is given"),
        (("--trace", "trace.jsonl", "--unset", "roles"), 3, "roles"),
        (("--trace", "trace.jsonl", "--profile", "none.json"), 1, "none.json: cannot read the profile"),
        (("--trace", "trace.jsonl", "--profile", "decode=profile.json"), 2, "no role 'decode'"),
        (("--trace", "trace.jsonl", "--speed", "0"), 2, "--speed must be above 0"),
        (("--trace", "trace.jsonl", "--rate-scale", "nan"), 2, "--rate-scale must be above 0"),
        (("--trace", "trace.jsonl", "--sla", "ttft=soon"), 3, "sla.ttft"),
    ],
)
def test_what_is_wrong_is_told_in_one_message(
    here: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, said: str
) -> None:
    good = '{"timestamp": 1, "input_length": 5, "output_length": 5}\n'
    (here / "broken.jsonl").write_text(good + good[:20])
    (here / "zero.jsonl").write_text(good.replace('"input_length": 5', '"input_length": 0'))
    (here / "empty.jsonl").write_text("")
    (here / "long.jsonl").write_text(good.replace('"input_length": 5', '"input_length": 70000'))
    found, out, err = asked(capsys, "recipe.yaml", *args)
    assert (found, out) == (code, "")
    assert said in err
    assert err.count("error:") == 1


def task(trace: str) -> Task:
    limits = Limits(kv_tokens=65_536, sequences=256, batched_tokens=8192)
    group = Group(role="aggregated", replicas=1, gpus=1, profile=DEFAULT, limits=limits)
    return Task(service=Service(name="t", groups=(group,)), trace=trace)


def test_a_simulator_that_dies_is_told_with_its_last_words(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    monkeypatch.setattr(simulate_process, "command", lambda spec: argv)
    with pytest.raises(ProfileError, match=r"died, exit 1 .*out of luck"):
        results_of(task("trace.jsonl"), drawn=False)


def test_a_simulator_that_hangs_is_ended(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(simulate_process, "_SILENT_S", 0.2)
    argv = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(simulate_process, "command", lambda spec: argv)
    with pytest.raises(ProfileError, match=r"has told nothing for 0\.2 s"):
        results_of(task("trace.jsonl"), drawn=False)
    assert started[0].returncode is not None


def test_the_time_left_is_that_of_the_run_that_goes_on() -> None:
    meter = Meter()
    assert meter.line(Progress(policy="planner", share=0.01), 100.0) == "planner  1%"
    assert meter.line(Progress(policy="planner", share=0.26), 105.0) == "planner  26%  14s left"
    assert meter.line(Progress(policy="oracle", share=0.01), 120.0) == "oracle  1%"
    assert meter.line(Progress(policy="oracle", share=0.51), 121.0) == "oracle  51%  0s left"


def test_a_sparkline_is_empty_only_where_there_is_nothing() -> None:
    assert sparkline([0.0, 0.1, 4.0, 8.0]) == " ▁▄█"
