from __future__ import annotations

from typing import Any

import pytest

from dynctl.errors import RecipeError
from dynctl.recipe.override import apply, collect
from dynctl.recipe.source import Document

DATA = {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}], "n": None}


def changed(*sets: str, unset: tuple[str, ...] = (), env: str = "") -> dict[str, Any]:
    document = Document(DATA, {(): "f:1", ("a",): "f:1", ("a", "b"): "f:2"})
    return apply(document, collect({"DYNCTL_SET": env}, sets, unset)).data


def test_values_are_yaml() -> None:
    data = changed("a.b=[1, two]", "a.c=", "a.d=x=y", "n.deep.er=true", "l.1.x=3", "l.2={x: 9}")
    assert data["a"] == {"b": [1, "two"], "c": None, "d": "x=y"}
    assert data["n"] == {"deep": {"er": True}}
    assert data["l"] == [{"x": 1}, {"x": 3}, {"x": 9}]
    assert DATA == {"a": {"b": 1}, "l": [{"x": 1}, {"x": 2}], "n": None}


def test_flags_win_over_the_environment() -> None:
    assert changed("a.b=3", env="a.b=2; a.c=5\n a.d=6")["a"] == {"b": 3, "c": 5, "d": 6}


def test_unset_comes_last() -> None:
    assert changed("a.c=1", unset=("a.b", "l.0")) == {"a": {"c": 1}, "l": [{"x": 2}], "n": None}


def test_places_are_the_flags() -> None:
    document = Document(DATA, {("a",): "f:1", ("a", "b"): "f:2", ("a", "b", "c"): "f:3"})
    wheres = apply(document, collect({}, ["a.b=1"], ["l"])).wheres
    assert wheres == {("a",): "f:1", ("a", "b"): "--set a.b=1"}
    assert apply(document, []) is document


@pytest.mark.parametrize(
    ("sets", "unset", "told"),
    [
        (["a.b"], (), "--set a.b: is not an assignment"),
        (["=1"], (), "--set =1: is not an assignment"),
        (["a..b=1"], (), "no field named"),
        (["a.b.c=1"], (), "--set a.b.c=1: 'a.b' is a whole number, it has no 'c'"),
        (["l.x=1"], (), "'x' is no place in that list (an index from 0 to 2)"),
        (["l.5.x=1"], (), "'5' is no place in that list (an index from 0 to 1)"),
        (["a.b=[1"], (), "broken YAML"),
        ([], ("a.x",), "--unset a.x: 'a.x' is not set (valid: b)"),
        ([], ("x.y",), "--unset x.y: 'x.y' is not set"),
        ([], ("l.2",), "'2' is no place in that list"),
        ([], ("",), "no field named"),
        (["e=[]", "e.1=2"], (), "'1' is no place in that list (an index from 0 to 0)"),
        (["e=[]", "e.1.x=2"], (), "'1' is no place in that list (the list is empty)"),
    ],
)
def test_what_cannot_be_set(sets: list[str], unset: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        changed(*sets, unset=unset)
    assert told in str(caught.value)
