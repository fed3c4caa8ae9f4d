"""The user's recipe with the chosen roles: its own text, so that comments stay."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dynctl.engines.base import Engine
from dynctl.engines.catalog import get
from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Option, Pool
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe, RoleSection

_PATHS = (
    ("model", "path"),
    ("model", "tokenizer"),
    ("model", "chat_template"),
    ("engine", "venv"),
    ("engine", "python"),
    ("frontend", "tls", "cert"),
    ("frontend", "tls", "key"),
)
_SIZES = (
    ("tensor_parallel", "tensor"),
    ("pipeline_parallel", "pipeline"),
    ("data_parallel", "data"),
    ("expert_parallel", "expert"),
)


def recipe_text(loaded: LoadedRecipe, option: Option, head: str) -> str:
    """The recipe that starts `option`, with `head` as its first comment.

    Paths that the recipe tells relative to itself are told whole. Raises ProfileError when the file has
    changed so that it holds no roles any more.
    """
    text = Path(loaded.file).read_text(encoding="utf-8-sig")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    roles = _entry(root, "roles")
    if roles is None:
        raise ProfileError("holds no roles", where=loaded.file)
    key, value = roles
    end = value.end_mark.index
    edits = [(key.start_mark.index, end, roles_text(loaded.recipe, option) + _rest(text, end))]
    edits += _whole_paths(root, loaded.recipe)
    for start, stop, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[stop:]
    return "".join(f"# {line}\n" for line in head.splitlines()) + "\n" + text


def _rest(text: str, end: int) -> str:
    """A block's end may lie at the next key, or where its last line ends."""
    return "\n" if end < len(text) and text[end - 1] == "\n" else ""


def roles_text(recipe: Recipe, option: Option) -> str:
    """The `roles` section, without a line end."""
    roles = {pool.role: _role(recipe, pool) for pool in option.pools}
    return yaml.safe_dump({"roles": roles}, sort_keys=False, default_flow_style=False).rstrip() + "\n"


def _role(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    engine = get(recipe.backend)
    before = section_before(recipe, pool)
    made: dict[str, Any] = {"replicas": pool.replicas}
    made |= {field: size for field, name in _SIZES if (size := getattr(pool.layout, name)) > 1}
    made["args"] = {**before.args, **limit_args(engine, pool)}
    made |= {name: value for name in ("env", "hosts") if (value := getattr(before, name))}
    return made


def limit_args(engine: Engine, pool: Pool) -> dict[str, int]:
    """The batch limits of a pool in the engine's own words, by rank."""
    ranks = pool.layout.data
    found = {engine.sequences_argument: pool.sequences, engine.step_tokens[0]: pool.batched_tokens}
    return {name: max(1, -(-value // ranks)) for name, value in found.items() if name}


def section_before(recipe: Recipe, pool: Pool) -> RoleSection:
    """What the recipe says of the role; of the nearest one when it has it not."""
    present: dict[str, RoleSection] = {role: one for role, one in recipe.roles.present().items()}
    nearest = {"aggregated": ("decode", "prefill"), "prefill": ("aggregated",), "decode": ("aggregated",)}
    for role in (pool.role, *nearest.get(pool.role, ())):
        if role in present:
            return present[role]
    return RoleSection()


def _entry(node: Any, name: str) -> tuple[Any, Any] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((key, value) for key, value in node.value if key.value == name), None)


def _whole_paths(root: Any, recipe: Recipe) -> Iterator[tuple[int, int, str]]:
    for keys in _PATHS:
        node: Any = root
        value: Any = recipe
        for key in keys:
            entry = _entry(node, key)
            node = entry[1] if entry else None
            value = getattr(value, key, None)
        if not isinstance(node, yaml.ScalarNode) or not isinstance(value, str):
            continue
        if os.path.isabs(value) and node.value != value and not node.value.startswith("builtin:"):
            yield node.start_mark.index, node.end_mark.index, json.dumps(value)
