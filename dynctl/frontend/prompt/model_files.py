"""What there is on disk of a model that prompts are made with: tokenizer, chat template, special tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dynctl.hub import builtin_dir, snapshot
from dynctl.protocol.instances import ModelCard


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What was found on disk for a model. `template_source` and `special_tokens` may be empty.

    `image_token`: the one that stands for an image in prompts; None = it is not stated.
    """

    tokenizer_json: Path | None
    template_source: str
    special_tokens: dict[str, str]
    image_token: int | None = None


def find_model_files(card: ModelCard) -> ModelFiles:
    """Tokenizer, chat template and special tokens of a model directory or a downloaded Hugging Face model.

    The card's own tokenizer and chat template go first. Raises OSError or ValueError for files that cannot
    be read.
    """
    if not (card.tokenizer or card.path):
        return ModelFiles(None, "", {})
    tokenizer = Path(card.tokenizer or card.path)
    tokenizer_dir = (
        tokenizer.parent if tokenizer.is_file() else local_model_dir(str(tokenizer), card.revision)
    )
    tokenizer_json = tokenizer if tokenizer.is_file() else _existing(tokenizer_dir, "tokenizer.json")
    config = _json_file(_existing(tokenizer_dir, "tokenizer_config.json"))
    special = _json_file(_existing(tokenizer_dir, "special_tokens_map.json")) | config
    return ModelFiles(
        tokenizer_json=tokenizer_json,
        template_source=_template_source(card, tokenizer_dir, config),
        special_tokens={name: _token(value) for name, value in special.items() if _is_token(name, value)},
        image_token=_image_token(card, tokenizer_dir),
    )


def local_model_dir(name: str, revision: str) -> Path | None:
    """Where model `name` is: the directory itself, or its snapshot in the Hugging Face cache, or None."""
    name = builtin_dir(name)
    found = name if os.path.isdir(name) else snapshot(name, revision, os.environ)
    return Path(found) if found else None


def _template_source(card: ModelCard, directory: Path | None, config: dict[str, Any]) -> str:
    if card.chat_template:
        return Path(card.chat_template).read_text()
    for where in (directory, local_model_dir(card.path, card.revision) if card.path else None):
        file = _existing(where, "chat_template.jinja")
        if file is not None:
            return file.read_text()
    named = _json_file(_existing(directory, "chat_template.json")).get("chat_template")
    found = named or config.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), "")
    return found if isinstance(found, str) else ""


def _image_token(card: ModelCard, directory: Path | None) -> int | None:
    for where in (local_model_dir(card.path, card.revision) if card.path else None, directory):
        config = _json_file(_existing(where, "config.json"))
        for name in ("image_token_id", "image_token_index"):
            if isinstance(config.get(name), int):
                return int(config[name])
    return None


def _existing(directory: Path | None, name: str) -> Path | None:
    return directory / name if directory is not None and (directory / name).is_file() else None


def _json_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: {error}") from error


def _is_token(name: str, value: object) -> bool:
    text = value.get("content") if isinstance(value, dict) else value
    return name.endswith("_token") and isinstance(text, str)


def _token(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)
