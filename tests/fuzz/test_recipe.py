"""Whatever a recipe file holds: a recipe, or an error that says where it is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dynctl.errors import RecipeError
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import load_recipe
from dynctl.recipe.schema import Recipe
from tests.fuzz.conftest import FUZZ

BASE: dict[str, Any] = {
    "schema": "dynctl/v1",
    "name": "x",
    "model": {"path": "builtin:tiny"},
    "backend": "mocker",
    "roles": {"aggregated": {"replicas": 1}},
}
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
VALUES: st.SearchStrategy[Any] = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_SCALARS, inner, max_size=3)
)


def _names(schema: dict[str, Any]) -> set[str]:
    """Every field name there is."""
    found = set(schema.get("properties", {}))
    for part in schema.get("$defs", {}).values():
        found |= set(part.get("properties", {}))
    return found


NAMES = st.sampled_from(sorted(_names(Recipe.model_json_schema())))
LIKELY = st.sampled_from(
    [
        "env:NOPE",
        "file:/nope",
        "sha256:zz",
        "${X}",
        "1Gi",
        "5s",
        "-1",
        "kv",
        "vllm",
        "http://[",
        "p99",
        "~",
        "\0",
        "../..",
    ]
)
FIELDS = st.recursive(
    LIKELY | VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4)
)
TEXTS = st.one_of(
    st.dictionaries(NAMES, FIELDS, max_size=4).map(lambda more: yaml.safe_dump({**BASE, **more})),
    FIELDS.map(yaml.safe_dump),
    st.text(max_size=80),
    st.lists(
        st.sampled_from(
            [
                "a: ",
                "- ",
                "&x ",
                "*x",
                "<<: ",
                "{",
                "[",
                "!!python/object:os.system ",
                "!t ",
                "? ",
                "|\n",
                "'",
                "\t",
                "\n",
                "%YAML 9\n",
                "---\n",
                "\ufeff",
                "name: x\n",
            ]
        ),
        max_size=12,
    ).map("".join),
    st.integers(1, 3000).map(lambda depth: "[" * depth),
    st.integers(1, 25).map(
        lambda n: "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, n))
    ),
).map(lambda text: text.encode("utf-8", "surrogatepass"))


def load(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    try:
        loaded = load_recipe(str(file), environ={})
        list(check_recipe(loaded))
    except RecipeError as error:
        str(error)


@FUZZ
@given(text=TEXTS | st.binary(max_size=40))
def test_a_recipe_file_is_a_recipe_or_a_recipe_error(
    tmp_path_factory: pytest.TempPathFactory, text: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    load(folder / "recipe.yaml", text)
