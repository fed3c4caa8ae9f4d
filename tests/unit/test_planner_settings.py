"""The planner section of a recipe: what is refused, with its reason, and what the planner goes by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from dynctl.errors import PlannerError, RecipeError
from dynctl.perfmodel.profile import DEFAULT, Limits, Subject
from dynctl.planner.config import PlannerConfig
from dynctl.planner.settings import about, config_of
from dynctl.recipe.check import check_recipe
from dynctl.recipe.costs import ROUTINGS
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.recipe.schema import Router

HEAD = "schema: dynctl/v1\nname: demo\nmodel: {path: m}\nsla: {ttft: 200ms, itl: 20ms, percentile: p99}\n"
VLLM = HEAD + "backend: vllm\nroles: {prefill: {tensor_parallel: 2}, decode: {tensor_parallel: 4}}\n"
MOCKER = HEAD.replace("{path: m}", "{path: 'builtin:tiny'}") + "backend: mocker\nroles: {aggregated: {}}\n"


@pytest.fixture(autouse=True)
def model(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_key_value_heads": 8}))
    (folder / "tokenizer.json").write_text("{}")


def loaded(tmp_path: Path, text: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    return load_recipe(file, environ={"HOME": str(tmp_path)})


def failure(tmp_path: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipe(loaded(tmp_path, text))
    return str(caught.value).replace(f"{tmp_path}/", "")


def made(tmp_path: Path, text: str, gpus: int = 0) -> PlannerConfig:
    recipe = loaded(tmp_path, text)
    check_recipe(recipe)
    config = config_of(recipe, gpus)
    assert config is not None
    return config


def test_without_the_section_or_switched_off_there_is_none(tmp_path: Path) -> None:
    for more in ("", "planner: {enabled: false}\n"):
        recipe = loaded(tmp_path, VLLM + more)
        check_recipe(recipe)
        assert config_of(recipe, 8) is None


def test_an_empty_section_turns_it_on_with_the_gpus_there_are(tmp_path: Path) -> None:
    config = made(tmp_path, VLLM + "planner: {}\n", gpus=16)
    assert (config.mode, config.gpus, config.interval_s, config.sla.percentile) == ("both", 16, 60.0, 0.99)
    assert {role: (one.gpus, one.maximum) for role, one in config.roles.items()} == {
        "prefill": (2, 8),
        "decode": (4, 4),
    }


def test_engines_without_gpus_have_no_budget_unless_one_is_given(tmp_path: Path) -> None:
    assert made(tmp_path, MOCKER + "planner: {}\n", gpus=4).gpus == 0
    config = made(tmp_path, MOCKER + "planner: {max_gpus: 3, roles: {aggregated: {min_replicas: 2}}}\n")
    assert (config.gpus, config.roles["aggregated"].minimum, config.roles["aggregated"].maximum) == (3, 2, 3)


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("{max_gpus: 5}", "the fewest replicas of all roles take 6 GPUs already"),
        ("{roles: {decode: {min_replicas: 3, max_replicas: 2}}}", "2 is below min_replicas, 3"),
        ("{interval: 1s}", "must not be shorter than planner.load_interval"),
        ("{profile: none.json}", "cannot read the profile"),
        ("{mode: sideways}", "planner.mode"),
        ("{gpu: h20}", "unknown GPU 'h20'"),
        ("{load_interval: 0}", "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_line(tmp_path: Path, section: str, told: str) -> None:
    message = failure(tmp_path, VLLM + f"planner: {section}\n")
    assert told in message
    assert message.startswith("r.yaml:7")


def test_without_a_service_level_there_is_nothing_to_keep(tmp_path: Path) -> None:
    for without in (VLLM.replace("sla: {ttft: 200ms, itl: 20ms, percentile: p99}\n", ""),):
        assert "there is no service level to keep" in failure(tmp_path, without + "planner: {}\n")
        with pytest.raises(PlannerError, match="no service level"):
            config_of(loaded(tmp_path, without + "planner: {}\n"), 8)


def test_engines_that_run_elsewhere_cannot_be_added_to(tmp_path: Path) -> None:
    text = HEAD + "backend: external\nroles: {aggregated: {urls: ['http://h:1']}}\nplanner: {}\n"
    assert "there is nothing to add or remove" in failure(tmp_path, text)


def profile(tmp_path: Path, name: str, **fields: object) -> Path:
    path = tmp_path / name
    subject = Subject(model="m", backend="vllm")
    filled = msgspec.structs.replace(DEFAULT, subject=msgspec.structs.replace(subject, **fields))
    path.write_bytes(msgspec.json.encode(filled))
    return path


SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 131072,
}


def test_without_a_profile_each_role_has_the_estimate_of_its_layout(tmp_path: Path) -> None:
    (tmp_path / "m/config.json").write_text(json.dumps(SIZES))
    config = made(tmp_path, VLLM + "planner: {gpu: h200_sxm}\n", gpus=16)
    prefill, decode = config.roles["prefill"].profile, config.roles["decode"].profile
    assert prefill is not None
    assert decode is not None
    assert (prefill.source, decode.source) == ("estimate", "estimate")
    assert prefill.subject is not None
    assert (prefill.subject.hardware, prefill.subject.layout.tensor) == ("H200", 2)
    assert decode.decode_s(8, 2000) < prefill.decode_s(8, 2000)
    assert config.roles["prefill"].unestimated == ""


def test_without_a_profile_and_without_an_estimate_it_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynctl.hostfacts.gpus", lambda: {"gpu_note": "nvidia-smi is not on PATH"})
    for section, why in (
        ("{}", "which GPU is not known (nvidia-smi is not on PATH); planner.gpu tells it"),
        ("{gpu: h100}", "num_hidden_layers"),
    ):
        role = made(tmp_path, VLLM + f"planner: {section}\n", gpus=16).roles["decode"]
        assert role.profile is None
        assert why in role.unestimated
    cpu = made(tmp_path, VLLM + "engine: {device: cpu}\nplanner: {}\n")
    assert "on CPUs" in cpu.roles["decode"].unestimated


def test_the_gpu_of_the_estimate_is_what_the_driver_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m/config.json").write_text(json.dumps(SIZES))
    monkeypatch.setattr("dynctl.hostfacts.gpus", lambda: {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}]})
    profile = made(tmp_path, VLLM + "planner: {}\n", gpus=16).roles["decode"].profile
    assert profile is not None
    assert profile.subject is not None
    assert profile.subject.hardware == "H100"


def test_a_simulated_engine_is_estimated_by_its_law_at_its_speed(tmp_path: Path) -> None:
    config = made(tmp_path, MOCKER + "engine: {args: {speedup: 2}}\nplanner: {}\n")
    profile = config.roles["aggregated"].profile
    assert profile is not None
    assert profile.source == "estimate"
    assert profile.decode_s(16, 4096) == pytest.approx(DEFAULT.decode_s(16, 4096) / 2)
    assert profile.prefill_s(0, 1024) == pytest.approx(DEFAULT.prefill_s(0, 1024) / 2)
    assert profile.transfer_s(5000) == pytest.approx(DEFAULT.transfer_s(5000) / 2)


def test_a_profile_of_something_else_is_refused_with_the_difference(tmp_path: Path) -> None:
    profile(tmp_path, "p.json", backend="sglang")
    text = VLLM + "planner: {profile: p.json}\n"
    message = failure(tmp_path, text)
    assert "is of something else: backend sglang, not vllm; layout TP1, not TP2" in message
    with pytest.raises(PlannerError, match="backend sglang, not vllm"):
        config_of(loaded(tmp_path, text), 8)


def test_profiles_by_role_are_found_beside_the_recipe_and_in_its_lock(tmp_path: Path) -> None:
    from dynctl.perfmodel.layout import Layout

    profile(tmp_path, "p.json", layout=Layout(tensor=2))
    profile(tmp_path, "d.json", layout=Layout(tensor=4), model="org/m")
    text = VLLM + "planner: {profile: p.json, roles: {decode: {profile: d.json}}}\n"
    config = made(tmp_path, text, gpus=16)
    assert config.roles["decode"].profile is not None
    lock = tmp_path / "elsewhere" / "lock.yaml"
    lock.parent.mkdir()
    lock.write_text(lock_text(loaded(tmp_path, text), "1"))
    assert config_of(load_recipe(lock, environ={}), 16) == config


def test_a_profile_that_has_gone_meanwhile_is_told(tmp_path: Path) -> None:
    from dynctl.perfmodel.layout import Layout

    path = profile(tmp_path, "p.json", layout=Layout(tensor=2))
    text = VLLM + "planner: {roles: {prefill: {profile: p.json}}}\n"
    made(tmp_path, text)
    path.unlink()
    with pytest.raises(PlannerError, match="cannot read the profile"):
        config_of(loaded(tmp_path, text), 8)


def test_limits_are_those_of_the_arguments(tmp_path: Path) -> None:
    args = "engine: {args: {max-num-seqs: 32, max-num-batched-tokens: 2048}}\n"
    config = made(tmp_path, VLLM + args + "planner: {}\n")
    assert config.roles["decode"].limits == Limits(kv_tokens=1 << 20, sequences=32, batched_tokens=2048)


def test_the_rules_are_told_to_people(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, VLLM + "planner: {advisory: true}\n")
    config = config_of(recipe, 8)
    assert config is not None
    told = about(config, recipe.recipe)
    assert told["advisory"] is True
    assert json.loads(json.dumps(told))["roles"]["decode"]["costs"] == "learnt"


@pytest.mark.parametrize("mode", get_args(Router.model_fields["mode"].annotation))
def test_the_planner_takes_the_router_as_the_profile_does(tmp_path: Path, mode: str) -> None:
    config = made(tmp_path, MOCKER + f"router: {{mode: {mode}}}\nplanner: {{}}\n")
    assert config.routing == ROUTINGS[mode]
    assert ROUTINGS["power_of_two"] == "random"
