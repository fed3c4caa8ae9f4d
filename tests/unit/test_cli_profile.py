"""`dynctl profile --estimate-only`: what it writes can be used, and each wrong question has its answer."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest

from dynctl.cli.main import dispatch
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile, Subject
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "llama70b-disagg.yaml")
ON = ("--gpu", "h200_sxm", "--gpus", "16", "--estimate-only")
USUAL = ("--sla", "ttft=400ms,itl=20ms", *ON)
APART = ("--sla", "ttft=3s,itl=16ms", *ON)


def asked(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = dispatch(["profile", *args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_sixteen_gpus_give_a_choice_with_all_its_parts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = asked(capsys, RECIPE, *USUAL)
    assert code == 0
    assert "p95 TTFT ≤ 400ms, ITL ≤ 20.0ms" in out
    assert "chosen" in out
    assert "runner-up" in out
    assert "prompts +20%" in out
    assert "TP1" in out.split("layouts that cannot be")[1]
    assert "next: dynctl up profile-llama70b-disagg/recipe.yaml --inventory hosts.yaml\n" in err
    again = asked(capsys, RECIPE, *USUAL)
    assert (out, err) == again[1:]


@pytest.mark.parametrize("args", [USUAL, APART], ids=["together", "apart"])
def test_the_recipe_that_is_written_is_taken_by_up(
    here: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
) -> None:
    code, out, _ = asked(capsys, RECIPE, "--json", "--out", "made", *args)
    assert code == 0
    told: dict[str, Any] = json.loads(out)
    loaded = load_recipe(here / "made" / "recipe.yaml")
    check_recipe(loaded)
    roles = loaded.recipe.roles.present()
    assert set(roles) == set(told["chosen"]["roles"])
    for name, pool in told["chosen"]["roles"].items():
        section = roles[name]
        assert (section.replicas, section.tensor_parallel) == (
            pool["replicas"],
            pool["layout"].get("tensor", 1),
        )
        assert section.args["max-num-seqs"] == pool["sequences"]
        assert section.args["max-num-batched-tokens"] == pool["batched_tokens"]
    text = (here / "made" / "recipe.yaml").read_text()
    assert "# or mooncake, mooncake_tcp: another library must then be installed" in text
    rest, before = (one.split("\nfrontend:")[1] for one in (text, Path(RECIPE).read_text()))
    sla = re.compile(r"\nsla:\n( .*\n)+")
    assert sla.sub("", rest) == sla.sub("", before)
    assert loaded.recipe.sla is not None
    assert (loaded.recipe.sla.ttft, loaded.recipe.sla.itl) == (told["sla"]["ttft_s"], told["sla"]["itl_s"])


def test_json_tells_prediction_and_rejected_layouts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = asked(capsys, RECIPE, "--json", *USUAL)
    told = json.loads(out)
    assert code == 0
    assert told["chosen"]["predicted"]["ttft_s"] <= 0.4 * 1.01
    assert told["chosen"]["predicted"]["itl_s"] <= 0.02
    assert told["chosen"]["predicted"]["tokens_per_s_per_gpu"] > 0
    assert [one["layout"] for one in told["rejected"]] == ["TP1"]
    assert {one["mode"] for one in told["options"]} == {"aggregated", "disaggregated"}
    assert told["chosen"]["gpus"] <= 16


def test_profiles_and_npz_are_written_beside_the_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, RECIPE, "--out", "made", *APART)[0] == 0
    for role in ("prefill", "decode"):
        saved = msgspec.json.decode((here / "made" / f"profile-{role}.json").read_bytes(), type=Profile)
        assert saved.subject is not None
        assert saved.subject.hardware == "H200"
    prefill = numpy.load(here / "made" / "selected_prefill_interpolation" / "raw_data.npz")
    decode = numpy.load(here / "made" / "selected_decode_interpolation" / "raw_data.npz")
    assert len(prefill["prefill_isl"]) == len(prefill["prefill_ttft"]) == 16
    rates = prefill["prefill_isl"] / prefill["prefill_ttft"] * 1000 / prefill["prefill_thpt_per_gpu"]
    assert rates == pytest.approx([rates[0]] * 16)
    assert (
        len({len(decode[name]) for name in ("x_kv_usage", "y_context_length", "z_itl", "z_thpt_per_gpu")})
        == 1
    )
    assert decode["x_kv_usage"].min() > 0
    assert decode["x_kv_usage"].max() <= 1.0
    assert decode["max_kv_tokens"].shape == (1,)


def test_without_room_for_the_sla_the_answer_is_why_and_no_recipe_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = asked(capsys, RECIPE, "--sla", "ttft=1ms,itl=20ms", *ON)
    assert code == 1
    assert "nothing keeps this SLA" in out
    assert "a TTFT of 1 ms cannot be kept" in out
    assert "TTFT" in out.split("nearest")[1]
    assert "runner-up" not in out
    assert "next:" not in err
    assert sorted(path.name for path in here.rglob("*.*")) == ["report.html", "report.png"]


def test_a_rate_beyond_the_gpus_tells_how_many_it_would_take(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = asked(capsys, RECIPE, "--rate", "40", *USUAL)
    assert code == 1
    assert "40 requests/s are more than 16 GPUs serve" in out
    assert "it would take" in out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("--sla", "ttft=fast"), 2, "--sla: ttft must be a duration"),
        (("--sla", "p95=1s"), 2, "'p95=1s' is not understood"),
        (("--sla", "ttft=1s,percentile=p100"), 2, "percentile must be such as p50"),
        (("--sla", "ttft=0ms"), 2, "ttft must be above 0"),
        (("--rate", "-3"), 2, "--rate must be above 0, not -3"),
        (("--rate", "nan"), 2, "--rate must be above 0"),
        (("--isl", "0"), 2, "--isl must be 1 or more tokens, not 0"),
        (("--osl", "0"), 2, "--osl must be 1 or more tokens, not 0"),
        (("--hit-rate", "1"), 2, "--hit-rate must be from 0 to below 1"),
        (("--gpus", "0"), 2, "--gpus must be 1 or more"),
        (("--gpu", "h9000"), 1, "unknown GPU 'h9000'"),
        (("--precision", "int3"), 1, "unknown precision 'int3'"),
        (("--isl", "200000"), 1, "the model's context is 131072"),
        (("--trace", "none.jsonl"), 1, "cannot read the trace"),
        (("--trace", "none.jsonl", "--isl", "5"), 2, "leave --isl and --osl out"),
        (("--set", "model.path=nobody/knows-it"), 1, "model 'nobody/knows-it' has no config"),
        (("--set", "backend=external"), 3, "external"),
    ],
)
def test_each_wrong_question_has_one_answer(
    here: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, said: str
) -> None:
    given = [*USUAL, *args]
    assert asked(capsys, RECIPE, *given)[0] == code
    got = dispatch(["profile", RECIPE, *given])
    err = capsys.readouterr().err
    assert got == code
    assert said in err
    assert not list(here.iterdir())


def test_without_a_gpu_named_it_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = asked(capsys, RECIPE, "--gpus", "16", "--estimate-only")
    assert code == 1
    assert "--gpu h200_sxm" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 3, "target ssh needs hosts"),
        (("--set", "target=local", "--set", "model.path=."), 2, "no GPU is found on this machine"),
        (("--budget", "12s"), 2, "--budget must be 20s or more, not 12 s"),
        (("--parallel", "-1"), 2, "above 0"),
        (("--gpus", "100000"), 2, "--gpus must be 2048 at most"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is_started(
    here: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, said: str
) -> None:
    config = {"hidden_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 32, "vocab_size": 1000}
    config |= {"intermediate_size": 8192, "num_key_value_heads": 8, "max_position_embeddings": 16384}
    (here / "config.json").write_text(json.dumps(config))
    found, _, err = asked(capsys, RECIPE, "--gpu", "h200", "--gpus", "16", *args)
    assert (found, said in err) == (code, True), err
    assert [path.name for path in here.iterdir()] == ["config.json"]


def test_a_recipe_without_sla_needs_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = asked(capsys, RECIPE, "--unset", "sla", *ON)
    assert code == 2
    assert "no service level is given" in err


def test_never_more_gpus_than_the_inventory_has(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "hosts.yaml").write_text("hosts: [{name: n1, gpus: 4}, {name: n2, gpus: 4}]\n")
    code, _, err = asked(capsys, RECIPE, *USUAL, "--inventory", "hosts.yaml")
    assert code == 2
    assert "--gpus 16, but hosts.yaml has 8" in err
    args = ("--sla", "ttft=3s,itl=40ms", "--gpu", "h200", "--estimate-only", "--inventory", "hosts.yaml")
    code, out, _ = asked(capsys, RECIPE, "--json", *args)
    assert code == 0
    sizes = [pool["layout"].get("tensor", 1) for pool in json.loads(out)["chosen"]["roles"].values()]
    assert max(sizes) <= 4


def test_a_profile_of_something_else_is_refused_with_the_difference(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = Subject(model="other/model", backend="vllm", hardware="H100", layout=Layout(tensor=8))
    limits = Limits(kv_tokens=1_000_000, sequences=256, batched_tokens=8192)
    made = msgspec.structs.replace(DEFAULT, subject=subject, limits=limits)
    (here / "p.json").write_bytes(msgspec.json.encode(made))
    code, _, err = asked(capsys, RECIPE, *USUAL, "--profile", "p.json")
    assert code == 1
    assert "model other/model, not meta-llama/Llama-3.1-70B-Instruct" in err
    assert "hardware H100, not H200" in err


def test_a_measured_profile_stands_for_the_estimate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = Subject(
        model="meta-llama/Llama-3.1-70B-Instruct", backend="vllm", hardware="H200", layout=Layout(tensor=8)
    )
    limits = Limits(kv_tokens=3_000_000, sequences=256, batched_tokens=8192)
    made = msgspec.structs.replace(DEFAULT, subject=subject, limits=limits, source="measured")
    (here / "p.json").write_bytes(msgspec.json.encode(made))
    code, out, _ = asked(capsys, RECIPE, *USUAL, "--json", "--profile", "p.json")
    assert code == 0
    assert "TP8" in json.loads(out)["chosen"]["label"]


def test_a_simulated_engine_is_chosen_for_by_its_own_law(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = str(ROOT / "recipes" / "quickstart.yaml")
    args = ("--sla", "ttft=500ms,itl=30ms", "--isl", "500", "--osl", "100", "--gpus", "6", "--estimate-only")
    code, out, _ = asked(capsys, quick, "--json", *args)
    assert code == 0
    chosen = json.loads(out)["chosen"]
    assert chosen["gpus"] <= 6
    loaded = load_recipe(here / "profile-quickstart" / "recipe.yaml")
    check_recipe(loaded)
    assert sum(section.replicas for section in loaded.recipe.roles.present().values()) == chosen["gpus"]


def test_relative_paths_are_whole_in_the_written_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "model").mkdir()
    config = {
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "intermediate_size": 14336, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (here / "model" / "config.json").write_text(json.dumps(config))
    text = Path(RECIPE).read_text().replace("meta-llama/Llama-3.1-70B-Instruct", "./model")
    (here / "mine.yaml").write_text(text)
    args = ("--out", "deep/er", "--gpu", "h100", "--gpus", "4", "--estimate-only")
    code, _, _ = asked(capsys, "mine.yaml", *args)
    assert code == 0
    assert f'path: "{here}/model"   # or a directory' in (here / "deep" / "er" / "recipe.yaml").read_text()


def test_the_report_names_the_choice_and_the_next_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = asked(capsys, RECIPE, "--json", "--out", "my made", *APART)
    assert code == 0
    page = (here / "my made" / "report.html").read_text()
    assert json.loads(out)["chosen"]["label"] in page
    assert "dynctl up &#39;my made/recipe.yaml&#39;" in page
    assert err.endswith("next: dynctl up 'my made/recipe.yaml' --inventory hosts.yaml\n")
    assert "report.html, report.png to my made" in err
    assert (here / "my made" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_all_but_the_plots_is_there(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = asked(capsys, RECIPE, "--json", "--out", "made", *APART)
    assert code == 0
    assert json.loads(out)["chosen"]
    assert err.count("pip install 'dynctl[profile]'") == 1
    assert (here / "made" / "recipe.yaml").is_file()
    assert "No plots: " in (here / "made" / "report.html").read_text()
    assert not (here / "made" / "report.png").exists()


@pytest.mark.parametrize(
    ("sla", "said"),
    [
        ("ttft=200", "ttft needs a unit: 200ms or 200s?"),
        ("ttft=1s,itl=20ms,percentile=0.95", "percentile must be such as p50"),
        ("ttft=1s,itl=20ms,ttft=2s", "ttft is given twice"),
    ],
)
def test_a_service_level_that_may_mean_two_things_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], sla: str, said: str
) -> None:
    code, _, err = asked(capsys, RECIPE, "--sla", sla, *ON)
    assert (code, said in err) == (2, True), err


def test_nothing_of_an_earlier_run_is_left_beside_a_report_that_has_no_recipe(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, RECIPE, "--out", "made", *APART)[0] == 0
    assert (here / "made" / "profile-prefill.json").is_file()
    assert asked(capsys, RECIPE, "--out", "made", "--sla", "ttft=1 ms,itl=20ms", *ON)[0] == 1
    left = {path.name for path in (here / "made").rglob("*") if path.is_file()}
    assert left == {"report.html", "report.png"}


def test_results_that_cannot_be_written_are_told_all_the_same(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "made").write_text("a file")
    code, out, err = asked(capsys, RECIPE, "--out", "made", *USUAL)
    assert code == 1
    assert "chosen" in out
    assert "made: results cannot be written: " in err


def test_a_report_that_cannot_be_written_costs_nothing_else(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "made" / "report.html").mkdir(parents=True)
    code, out, err = asked(capsys, RECIPE, "--json", "--out", "made", *APART)
    assert code == 0
    assert json.loads(out)["chosen"]
    assert "warning: no report: " in err
    assert (here / "made" / "recipe.yaml").is_file()
