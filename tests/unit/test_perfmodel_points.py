"""Rows of a table become deployments: broken cells are told, unclear layouts guessed and marked so."""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.errors import ProfileError
from dynctl.perfmodel.accuracy import predicted
from dynctl.perfmodel.calibration import Effect, calibration
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.points import deployment_of
from dynctl.perfmodel.precision import Precision
from dynctl.perfmodel.serving import Deployment, effect_terms, load_of, predict_s
from dynctl.perfmodel.shapes import ModelShape

DATA = Path(__file__).resolve().parent.parent / "data" / "serving_points.csv.gz"
with gzip.open(DATA, "rt", newline="") as _file:
    COLUMNS = tuple(next(csv.reader(_file)))
DENSE = {
    "model": "meta-llama/Llama-3.1-70B", "system": "h200_sxm", "backend": "vllm", "mode": "agg",
    "isl": "1024", "osl": "1024", "concurrency": "16", "tp": "4",
}  # fmt: skip
EXPERTS = {**DENSE, "model": "deepseek-ai/DeepSeek-R1", "system": "b200_sxm", "backend": "trtllm", "tp": "8"}
CELLS = st.sampled_from(
    ("", "0", "1", "2", "3", "8", "64", "-1", "1e9", "1e300", "nan", "inf", "0.5", "agg", "disagg", "fp8",
     "nvfp4", "~nobody/x", "a\0b", "x" * 5000, "suspect", "partial", "gb200", "zhipuai/GLM-5",
     "openai/gpt-oss-120b"),
) | st.text("a1.,-~/ ", max_size=5)  # fmt: skip


def shapes(name: str) -> ModelShape:
    return find_shape(name, {})


def deployment(row: Mapping[str, str], **changes: str) -> Deployment:
    return deployment_of({**row, **changes}, shapes)


@given(st.sampled_from((DENSE, EXPERTS)), st.dictionaries(st.sampled_from(COLUMNS), CELLS, max_size=6))
def test_no_cell_breaks_the_run(row: dict[str, str], changes: dict[str, str]) -> None:
    told = predicted({**row, **changes}, shapes)
    assert bool(told.reason) != bool(told.ttft_ms and told.tpot_ms)
    if not told.reason:
        assert float(told.ttft_ms) > 0
        assert float(told.tpot_ms) > 0


@given(st.integers(1, 512), st.integers(1, 16000), st.integers(1, 8))
def test_more_load_is_never_faster(concurrency: int, isl: int, more: int) -> None:
    """By the formulas; what is fitted on top is the same for both."""
    for row in (DENSE, EXPERTS):
        low = deployment(row, concurrency=str(concurrency), isl=str(isl))
        high = deployment(row, concurrency=str(concurrency * more), isl=str(isl))
        for less, much in zip(predict_s(low, calibration()), predict_s(high, calibration()), strict=True):
            assert much >= less * 0.999


@pytest.mark.parametrize(
    ("changes", "layout", "guessed"),
    [
        ({}, Layout(tensor=8), False),
        ({"attention_dp": "8", "tp": "1", "moe_ep": "8"}, Layout(data=8, expert=8), False),
        ({"tp": "8", "concurrency": "40", "batch": "5", "moe_ep": "8"}, Layout(data=8, expert=8), True),
        ({"tp": "36", "system": "gb200"}, Layout(data=32, expert=32), True),
        ({"tp": "2", "moe_tp": "4"}, Layout(tensor=4), True),
        ({"layout_status": "suspect"}, Layout(tensor=8), True),
    ],
)
def test_layouts_that_are_not_clear_are_guessed_and_marked(
    changes: dict[str, str], layout: Layout, guessed: bool
) -> None:
    found = deployment(EXPERTS, **changes)
    assert (found.decode, found.guessed) == (layout, guessed)


def test_pools_that_are_stated_are_taken_as_they_are() -> None:
    found = deployment(
        EXPERTS,
        mode="disagg",
        prefill_workers="2",
        prefill_tp="4",
        decode_workers="3",
        decode_tp="1",
        decode_attention_dp="8",
        decode_moe_ep="8",
    )
    assert found.prefill == Layout(tensor=4)
    assert found.decode == Layout(data=8, expert=8)
    assert found.workers == (2, 3)
    assert not found.guessed


@pytest.mark.parametrize(
    ("changes", "decode", "workers"),
    [
        ({"decode_tp": "8"}, Layout(tensor=8), (1, 4)),
        ({"decode_tp": "8", "concurrency": "512"}, Layout(data=8, expert=8), (1, 2)),
        ({"decode_tp": "48", "concurrency": "2048", "isl": "8192"}, Layout(data=32, expert=32), (4, 1)),
        ({"decode_tp": "1", "system": "h100_sxm"}, Layout(data=16, expert=16), (1, 1)),
    ],
)
def test_pools_without_worker_counts_are_guessed(
    changes: dict[str, str], decode: Layout, workers: tuple[int, int]
) -> None:
    found = deployment(EXPERTS, mode="disagg", prefill_tp="4", **changes)
    assert (found.decode, found.workers, found.guessed) == (decode, workers, True)


@pytest.mark.parametrize(
    ("row", "changes", "precision"),
    [
        (DENSE, {}, Precision()),
        (DENSE, {"weight_quant": "fp8"}, Precision(weights="fp8", experts="fp8", kv="fp8")),
        (DENSE, {"precision": "fp4"}, Precision(weights="fp4", experts="fp4", kv="fp8")),
        (EXPERTS, {"weight_quant": "nvfp4"}, Precision(weights="fp8", experts="fp4", kv="fp8")),
        (EXPERTS, {}, Precision(weights="fp8", experts="fp8")),
    ],
)
def test_precision_is_as_stated_or_as_published(
    row: dict[str, str], changes: dict[str, str], precision: Precision
) -> None:
    assert deployment(row, **changes).precision == precision


def test_effects_of_what_points_share_are_factors() -> None:
    what = deployment(DENSE)
    key = next(iter(effect_terms(what)))
    plain = msgspec.structs.replace(calibration(), effects={"agg other": Effect(tpot=1.0, ttft=1.0)})
    known = msgspec.structs.replace(plain, effects={key: Effect(tpot=math.log(2), ttft=math.log(3))})
    tpot, ttft = predict_s(what, plain)
    assert predict_s(what, known) == pytest.approx((2 * tpot, 3 * ttft))


def test_engines_that_were_not_measured_have_the_constants_of_all() -> None:
    assert calibration().engine("another") == calibration().other
    assert predict_s(deployment(DENSE, backend="another"), calibration())[0] > 0


def test_requests_without_kv_room_wait() -> None:
    few = load_of(deployment(DENSE, isl="8192", tp="2", concurrency="4"))
    many = load_of(deployment(DENSE, isl="8192", tp="2", concurrency="400"))
    assert few.waiting == 0
    assert many.waiting > 1
    assert many.running < 100


def test_model_is_found_in_a_directory_the_hub_cache_and_the_table(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8}
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps({**config, "intermediate_size": 8}))
    environ = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    assert find_shape("some/model", environ).layers == 2
    assert find_shape(str(snapshot), {}).layers == 2
    assert find_shape("meta-llama/Llama-3.1-70B-Instruct", environ).layers == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        ("[]", "is not a mapping (the config.json of a model)"),
        (
            "{}",
            "the config of {place} lacks num_hidden_layers, hidden_size, num_attention_heads, vocab_size",
        ),
    ],
)
def test_a_config_that_is_none_is_told_with_its_path(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ProfileError) as refusal:
        find_shape(str(tmp_path), {})
    assert str(refusal.value).startswith(f"{tmp_path}/config.json: {message.format(place=tmp_path)}")


def test_a_directory_without_config_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"has no config: no config\.json in it, not in the table"):
        find_shape(str(tmp_path), {})
