"""The real AIConfigurator answers as recorded, and refuses in its own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.gpus import gpu_named
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.roofline import Roofline
from dynctl.profiler.aiconfigurator import AiConfigurator
from tests.engines.environment import aiconfigurator_venv
from tests.perf.aiconfigurator import BACKENDS, LAYOUTS, record

pytestmark = [pytest.mark.aiconfigurator, pytest.mark.timeout(300)]
RECORDED = Path(__file__).resolve().parents[1] / "data" / "aiconfigurator.json"


def python() -> str:
    return str(aiconfigurator_venv() / "bin" / "python")


def asked(model: str, gpu: str = "H200", backend: str = "vllm", name: str = "") -> AiConfigurator:
    return AiConfigurator(Roofline(find_shape(model, {}), gpu_named(gpu), backend), name or model, python())


def close(ours: Any, theirs: Any) -> bool:
    """The same but for the last digits of numbers."""
    if isinstance(ours, dict):
        return set(ours) == set(theirs) and all(close(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return bool(ours == pytest.approx(theirs, rel=1e-6) if isinstance(ours, float) else ours == theirs)


def test_its_answers_are_those_that_the_unit_tests_play() -> None:
    now = json.loads(json.dumps(record(python())))
    assert len(now["heard"]) == len(BACKENDS) * (1 + len(LAYOUTS))
    assert close(now, json.loads(RECORDED.read_text()))


def test_experts_over_ranks_are_estimated_or_refused_with_what_is_missing() -> None:
    estimator = asked("deepseek-ai/DeepSeek-R1", backend="sglang")
    apart = estimator.profile(Layout(tensor=2, data=4, expert=8))
    assert 0.0 < apart.decode_s(64, 4000) < apart.decode_s(512, 4000)
    with pytest.raises(ProfileError, match=r"EP16: AIConfigurator: WideEP .* data missing .* at h200_sxm"):
        estimator.profile(Layout(data=16, expert=16))


def test_what_it_has_no_figures_of_is_refused_with_what_it_has() -> None:
    with pytest.raises(ProfileError, match=r"no figures of GPU mi300x \(it has a100_sxm, .*h200_sxm"):
        asked("meta-llama/Llama-3.1-8B", gpu="MI300X")
    with pytest.raises(ProfileError, match=r"no figures of other on h200_sxm \(it has sglang, trtllm, vllm"):
        asked("meta-llama/Llama-3.1-8B", backend="other")


def test_a_model_that_is_not_bundled_is_not_downloaded() -> None:
    with pytest.raises(ProfileError, match="no config of someone/Unheard-Of"):
        asked("meta-llama/Llama-3.1-8B", name="someone/Unheard-Of")


def test_a_directory_with_a_config_is_taken(tmp_path: Path) -> None:
    heard = json.loads(RECORDED.read_text())["heard"]
    (tmp_path / "config.json").write_text(json.dumps(heard[0][1]["config"]))
    made = asked("meta-llama/Llama-3.1-70B", name=str(tmp_path)).profile(Layout(tensor=2))
    told = next(answer for question, answer in heard if question.get("sizes", {}).get("tp_size") == 2)
    assert [s * 1000 for s in made.prefill.seconds] == pytest.approx(told["prefill_ms"])
