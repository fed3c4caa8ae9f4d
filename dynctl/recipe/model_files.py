"""What is at hand of a model: its directory, tokenizer, chat template, and the figures in its config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynctl.engines.base import ModelFacts

_HF_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Absolute paths, "" for what is not at hand here. `tokenizer` is a directory or a tokenizer.json."""

    directory: str = ""
    tokenizer: str = ""
    chat_template: str = ""
    facts: ModelFacts | None = None


def is_path(value: str, base: Path) -> bool:
    """Whether a model, tokenizer or template is meant as a path rather than a Hugging Face id."""
    return value.startswith(("/", "./", "../", "~")) or value in (".", "..") or (base / value).exists()


def is_hub_id(value: str) -> bool:
    """Whether a value has the shape of a Hugging Face id (org/name or name)."""
    return _HF_ID.fullmatch(value) is not None and ".." not in value


def tokenizer_in(directory: str) -> str:
    """The directory itself when it holds a fast tokenizer, else ""."""
    return directory if directory and Path(directory, "tokenizer.json").is_file() else ""


def read_facts(directory: str) -> ModelFacts | None:
    """Figures of config.json; None when there is none. Raises ValueError when it is not what it should be.

    Multimodal models keep those of the language model under "text_config".
    """
    path = Path(directory, "config.json")
    if not directory or not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError("config.json is not a mapping")
    inner = config.get("text_config")
    if isinstance(inner, dict):
        config = {**config, **inner}
    heads = _number(config, "num_attention_heads")
    dtype = config.get("dtype", config.get("torch_dtype", ""))
    return ModelFacts(
        kv_heads=_number(config, "num_key_value_heads") or heads,
        attention_heads=heads,
        layers=_number(config, "num_hidden_layers"),
        max_position=_number(config, "max_position_embeddings"),
        dtype=dtype if isinstance(dtype, str) else "",
    )


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0
