"""The own estimator: sizes as published, times that grow with the work, layouts that cannot be are
refused.
"""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.errors import ProfileError
from dynctl.perfmodel.gpus import GPUS, gpu_named
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import EngineLimits, fit
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.profile import parse_profile
from dynctl.perfmodel.roofline import Roofline
from dynctl.perfmodel.shapes import ModelShape, known_models, known_shape, shape_of

LAYOUTS = (
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(tensor=8),
    Layout(tensor=8, expert=8),
    Layout(tensor=1, data=8, expert=8),
    Layout(tensor=4, pipeline=2),
)


def shape(name: str) -> ModelShape:
    found = known_shape(name)
    assert found is not None
    return found


def estimator(name: str = "deepseek-ai/DeepSeek-R1", backend: str = "sglang", gpu: str = "B200") -> Roofline:
    return Roofline(shape(name), gpu_named(gpu), backend)


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03, 131_072),
        ("meta-llama/Llama-3.1-70B", 70.55, 327_680),
        ("meta-llama/Llama-3.1-405B", 405.85, 516_096),
        ("Qwen/Qwen3-235B-A22B", 235.0, 192_512),
        ("deepseek-ai/DeepSeek-V3", 671.0, 70_272),
        ("openai/gpt-oss-120b", 116.8, 73_728),
        ("MiniMaxAI/MiniMax-M2.5", 228.6, 253_952),
        ("zai-org/GLM-5", 743.1, 89_856),
    ],
)
def test_sizes_are_those_published(name: str, billions: float, kv_bytes: int) -> None:
    assert shape(name).params / 1e9 == pytest.approx(billions, rel=0.002)
    assert shape(name).kv_bytes_per_token(Precision()) == kv_bytes


@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_profiles_are_ones_that_can_be_read_again(gpu: str) -> None:
    profile = Roofline(
        shape("meta-llama/Llama-3.1-8B"), GPUS[gpu], "vllm", limits=EngineLimits(batched_tokens=2048)
    ).profile(Layout())
    assert parse_profile(msgspec.json.encode(profile), "here") == profile


@given(
    st.sampled_from(known_models()),
    st.sampled_from(LAYOUTS),
    st.floats(1, 2000),
    st.floats(1, 1e5),
    st.floats(1, 4),
)
def test_more_work_never_takes_less_time(
    name: str, layout: Layout, batch: float, context: float, more: float
) -> None:
    made = estimator(name)
    least = 1 - 1e-12
    assert made.decode_s(layout, batch * more, context) >= made.decode_s(layout, batch, context) * least > 0
    assert made.decode_s(layout, batch, context * more) >= made.decode_s(layout, batch, context) * least
    assert made.prefill_s(layout, context * more) >= made.prefill_s(layout, context) * least > 0


@pytest.mark.parametrize("name", known_models())
@pytest.mark.parametrize("gpu", ["H100", "B300"])
def test_more_tensor_parallelism_never_fits_less(name: str, gpu: str) -> None:
    tokens = []
    for tensor in (1, 2, 4, 8):
        try:
            room = fit(shape(name), GPUS[gpu], Precision(), Layout(tensor=tensor), EngineLimits())
            tokens.append(room.kv_tokens)
        except ProfileError:
            tokens.append(0)
    assert tokens == sorted(tokens)


@pytest.mark.parametrize(
    ("name", "gpu", "layout", "message"),
    [
        (
            "meta-llama/Llama-3.1-70B",
            "H200",
            Layout(tensor=3),
            "TP3: 64 attention heads do not divide by TP3",
        ),
        (
            "meta-llama/Llama-3.1-70B",
            "H100",
            Layout(tensor=1),
            "TP1: 141.1 GB of weights and 5.4 GB of workspace a GPU do not fit on 80 GB H100 of which 90% "
            "may be used (more GPUs a replica or a smaller precision)",
        ),
        (
            "meta-llama/Llama-3.1-8B",
            "H100",
            Layout(expert=2),
            "TP1·EP2: the model has no experts to spread (more replicas do the same)",
        ),
        (
            "deepseek-ai/DeepSeek-V3",
            "B200",
            Layout(tensor=8, expert=3),
            "TP8·EP3: EP3 does not divide the 8 GPUs of a stage",
        ),
        (
            "Qwen/Qwen3-8B",
            "H100",
            Layout(pipeline=37),
            "TP1·PP37: PP37 is more than the 36 layers",
        ),
        ("Qwen/Qwen3-8B", "H100", Layout(tensor=0), "TP0: parallel sizes must be 1 or more"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_the_reason(
    name: str, gpu: str, layout: Layout, message: str
) -> None:
    with pytest.raises(ProfileError) as refusal:
        estimator(name, gpu=gpu).profile(layout)
    assert str(refusal.value) == message


def test_model_without_config_tells_what_lacks() -> None:
    with pytest.raises(ProfileError, match=r"the config of x lacks num_hidden_layers, .*intermediate_size"):
        shape_of({"hidden_size": 5}, "x")


@pytest.mark.parametrize(
    ("text", "name"), [("h200_sxm", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("gb200", "GB200")]
)
def test_gpu_is_known_by_the_names_it_goes_by(text: str, name: str) -> None:
    assert gpu_named(text).name == name


def test_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(ProfileError, match=r"unknown GPU 'H20' \(.*known: A100, B200, B300, GB200"):
        gpu_named("H20")


def test_experts_spread_over_data_ranks_hold_more_kv_of_a_latent_model() -> None:
    made = estimator(gpu="H200")
    wide, narrow = made.profile(Layout(data=8, expert=8)), made.profile(Layout(tensor=8))
    assert wide.limits is not None
    assert narrow.limits is not None
    assert wide.limits.kv_tokens > 4 * narrow.limits.kv_tokens
