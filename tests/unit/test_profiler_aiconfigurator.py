"""AIConfigurator as an estimator, played by a program that answers as the real one did (tests/data)."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.cli.main import dispatch
from dynctl.errors import DynctlError, NotReady, ProcessExited, ProfileError
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.roofline import CONTEXTS, PROMPTS, Roofline
from dynctl.profiler.aiconfigurator import AiConfigurator
from dynctl.profiler.aiconfigurator_child import Refused, bundled

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "aiconfigurator.json"
RECIPE = str(ROOT / "recipes" / "llama70b-disagg.yaml")
MODEL = "meta-llama/Llama-3.1-70B-Instruct"
ON = ("--sla", "ttft=400ms,itl=20ms", "--gpu", "h200_sxm", "--gpus", "16", "--estimate-only")
PLAYER = f"""#!{sys.executable}
import json, os, sys, time
heard = json.load(open({str(RECORDED)!r}))["heard"]
change = json.loads(os.environ.get("PLAYED", "{{}}"))
backend = ""
for line in sys.stdin:
    asked = json.loads(line)
    first = "gpu" in asked
    backend = asked.get("backend", backend)
    spoken = ""
    for question, answer in heard:
        spoken = question.get("backend", spoken)
        if spoken == backend and question == asked:
            break
    else:
        sys.exit("not recorded: " + line)
    for name, value in change.get("first" if first else "layout", {{}}).items():
        if name == "sleep":
            time.sleep(value)
        elif name == "die":
            sys.exit("a fault of its own")
        elif name == "say":
            print(value, flush=True)
        else:
            answer[name] = value
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def player(tmp_path: Path) -> str:
    """What stands for the Python that has AIConfigurator."""
    path = tmp_path / "python"
    path.write_text(PLAYER)
    path.chmod(0o755)
    return str(path)


def plays(monkeypatch: pytest.MonkeyPatch, **change: dict[str, Any]) -> None:
    """Answer something else than the real one did."""
    monkeypatch.setenv("PLAYED", json.dumps(change))


def roofline(backend: str = "vllm", **more: Any) -> Roofline:
    return Roofline(find_shape(MODEL, {}), gpu_named("H200"), backend, **more)


def estimator(python: str, backend: str = "vllm", deadline_s: float = 60.0) -> AiConfigurator:
    return AiConfigurator(roofline(backend), MODEL, python, deadline_s=deadline_s)


def answers(backend: str, tensor: int) -> dict[str, Any]:
    spoken = ""
    for question, answer in json.loads(RECORDED.read_text())["heard"]:
        spoken = question.get("backend", spoken)
        if spoken == backend and question.get("sizes", {}).get("tp_size") == tensor:
            return dict(answer)
    raise AssertionError("not recorded")


@pytest.mark.parametrize("backend", ["vllm", "trtllm"])
def test_a_profile_has_the_times_that_were_answered(player: str, backend: str) -> None:
    made = estimator(player, backend).profile(Layout(tensor=4))
    told = answers(backend, 4)
    assert made.source == "estimate"
    assert made.subject == roofline(backend).profile(Layout(tensor=4)).subject
    assert list(made.prefill.tokens) == list(PROMPTS)
    assert [s * 1000 for s in made.prefill.seconds] == pytest.approx(told["prefill_ms"])
    assert list(made.decode.context) == list(CONTEXTS)
    assert made.decode_s(64, 4096) * 1000 == pytest.approx(
        told["decode_ms"][made.decode.batch.index(64)][CONTEXTS.index(4096)]
    )
    assert made.limits is not None
    assert made.limits.kv_tokens == told["kv_tokens"]
    assert made.transfer == roofline(backend).profile(Layout(tensor=4)).transfer
    assert f"AIConfigurator 0.12.0 with its figures of {backend}" in made.name


def test_the_same_question_gives_the_same_profile(player: str) -> None:
    both = [estimator(player).profile(Layout(tensor=2)) for _ in range(2)]
    assert both[0] == both[1]


def test_a_layout_is_refused_with_its_own_reason(player: str) -> None:
    with pytest.raises(
        ProfileError, match=r"^TP1: AIConfigurator: no KV budget: non-KV memory \(146339266560"
    ):
        estimator(player).profile(Layout())


def test_sizes_that_do_not_divide_are_refused_before_it_is_asked(player: str) -> None:
    with pytest.raises(ProfileError, match="TP3: 64 attention heads do not divide"):
        estimator(player).profile(Layout(tensor=3))


def test_too_little_kv_is_refused(player: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plays(monkeypatch, layout={"kv_tokens": 100})
    with pytest.raises(ProfileError, match="only 100 tokens of KV are left"):
        estimator(player).profile(Layout(tensor=4))


def test_weights_in_another_format_are_refused(player: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plays(monkeypatch, layout={"gemm": "fp8_block"})
    with pytest.raises(ProfileError, match=r"takes weights to be fp8_block, dynctl bf16"):
        estimator(player).profile(Layout(tensor=4))


@pytest.mark.parametrize("field", ["prefill_ms", "decode_ms"])
def test_figures_that_are_missing_are_no_profile(
    player: str, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    plays(monkeypatch, layout={field: answers("vllm", 4)[field][:-1]})
    with pytest.raises(ProfileError, match="AIConfigurator's answer: "):
        estimator(player).profile(Layout(tensor=4))


FIRST: tuple[tuple[dict[str, Any], type[DynctlError], str], ...] = (
    ({"version": "0.13.0"}, ProfileError, r"has AIConfigurator 0.13.0 \(pip install aiconfigurator==0.12.0"),
    ({"absent": True}, ProfileError, "has no AIConfigurator"),
    ({"refused": "has no figures", "hint": "it has x"}, ProfileError, r"no figures \(it has x\)"),
    ({"config": {}}, ProfileError, "lacks num_hidden_layers"),
    ({"die": 1}, ProcessExited, "exit code 1\na fault of its own"),
    ({"say": "Warning: noise"}, ProcessExited, "cannot be read.*Warning: noise"),
)


@pytest.mark.parametrize(("change", "error", "message"), FIRST, ids=[next(iter(one[0])) for one in FIRST])
def test_what_is_wrong_from_the_start_is_one_error(
    player: str,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[DynctlError],
    message: str,
) -> None:
    plays(monkeypatch, first=change)
    with pytest.raises(error, match=message):
        estimator(player)


def test_another_model_under_the_same_name_is_refused(player: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(RECORDED.read_text())["heard"][0][1]["config"]
    plays(monkeypatch, first={"config": {**config, "num_hidden_layers": 40}})
    with pytest.raises(ProfileError, match=r"Meta-Llama-3.1-70B is not .*: layers, dense_layers differ"):
        estimator(player)


def test_a_child_that_hangs_or_dies_ends_the_run_and_is_no_refused_layout(
    player: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays(monkeypatch, first={"sleep": 600})
    with pytest.raises(NotReady, match="AIConfigurator has not answered within 1 s"):
        estimator(player, deadline_s=1.0)
    plays(monkeypatch, layout={"die": 1})
    assert dispatch(["profile", RECIPE, *ON, "--estimator", f"aiconfigurator:{player}"]) == 5


def test_no_child_is_left_behind(player: str) -> None:
    asked = estimator(player)
    pid = asked._child._process.pid
    del asked
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_another_precision_is_asked_for_in_its_words(player: str) -> None:
    # The player knows no such question: what it was asked is in its last words.
    with pytest.raises(ProcessExited, match=r'"gemm":"fp8","moe":"fp8"'):
        AiConfigurator(roofline(precision=Precision.named("fp8")), MODEL, player)


def test_ranks_and_experts_are_told_in_its_words_and_their_batches_add_up(
    player: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = find_shape("deepseek-ai/DeepSeek-R1", {})
    asked = estimator(player)
    told = msgspec.convert(answers("vllm", 4) | {"gemm": "fp8_block"}, dict[str, Any])
    sent: list[dict[str, Any]] = []

    def ask(line: bytes) -> bytes:
        sent.append(json.loads(line))
        return json.dumps(told).encode()

    monkeypatch.setattr(asked._child, "ask", ask)
    asked._roofline = Roofline(shape, gpu_named("H200"), "vllm")
    made = asked.profile(Layout(tensor=2, data=4, expert=4))
    assert sent[0]["sizes"] == {
        "tp_size": 2,
        "pp_size": 1,
        "attention_dp_size": 4,
        "moe_ep_size": 4,
        "moe_tp_size": 2,
    }
    assert made.decode.batch[:3] == (1.0, 4.0, 8.0)
    assert made.decode.seconds[0] == made.decode.seconds[1]
    assert made.limits is not None
    assert made.limits.kv_tokens == 4 * told["kv_tokens"]


def test_profile_chooses_by_it_and_says_so(
    player: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["profile", RECIPE, *ON, "--json", "--out", "made", "--estimator", f"aiconfigurator:{player}"]
    assert dispatch(args) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "estimated by AIConfigurator 0.12.0 with its figures of vllm 0.24.0" in err
    assert told["chosen"]["label"] == "2 x TP8 aggregated"
    assert told["rejected"][0]["reason"].startswith("AIConfigurator: no KV budget")
    saved = msgspec.json.decode(Path("made/profile-aggregated.json").read_bytes(), type=Profile)
    assert [s * 1000 for s in saved.prefill.seconds] == pytest.approx(answers("vllm", 8)["prefill_ms"])


@pytest.mark.parametrize(
    ("recipe", "value", "code", "message"),
    [
        (RECIPE, "sorcery", 2, "'sorcery' is not known (roofline, aiconfigurator"),
        (RECIPE, "roofline:/python", 2, "is not known"),
        (RECIPE, "aiconfigurator:/no/python", 1, "/no/python: cannot run AIConfigurator: No such file"),
        (
            RECIPE,
            f"aiconfigurator:{sys.executable}",
            1,
            f"{sys.executable}: has no AIConfigurator (pip install",
        ),
        (str(ROOT / "recipes" / "quickstart.yaml"), "aiconfigurator", 1, "backend mocker is simulated"),
    ],
    ids=["unknown", "roofline-has-no-python", "no-python", "absent", "simulated"],
)
def test_an_estimator_that_cannot_be_is_one_error(
    capsys: pytest.CaptureFixture[str], recipe: str, value: str, code: int, message: str
) -> None:
    assert dispatch(["profile", recipe, *ON, "--estimator", value]) == code
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_only_the_same_model_is_taken_for_one_that_is_not_bundled() -> None:
    known = {"meta-llama/Meta-Llama-3.1-70B", "nvidia/Llama-3.1-70B-Instruct-FP8", "Qwen/Qwen3-8B"}
    assert bundled(MODEL, known) == "meta-llama/Meta-Llama-3.1-70B"
    assert bundled("nvidia/Llama-3.1-70B-Instruct-FP8", known) == "nvidia/Llama-3.1-70B-Instruct-FP8"
    with pytest.raises(Refused):
        bundled("Qwen/Qwen3-8B-FP8", known)
