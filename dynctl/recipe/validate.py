"""From plain values to a Recipe, or to all that is wrong with them in words a user can act on."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dynctl.recipe.problems import Problem, did_you_mean
from dynctl.recipe.source import Document, Keys, kind_of

_LONGEST_KEY = 40
_M = TypeVar("_M", bound=BaseModel)
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "int_from_float": "a whole number",
}


def validate(model: type[_M], document: Document) -> _M | list[Problem]:
    """The model made of the document, or its problems (at least one), in the order of the file."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        return [_problem(model, details, document.wheres) for details in error.errors(include_url=False)]


def where_of(wheres: Mapping[Keys, str], keys: Keys) -> str:
    """The place of a value, or of the nearest thing around it that was written."""
    while keys and keys not in wheres:
        keys = keys[:-1]
    return wheres.get(keys, "")


def _problem(model: type[BaseModel], details: ErrorDetails, wheres: Mapping[Keys, str]) -> Problem:
    keys: Keys = tuple(k for k in details["loc"] if k != "[key]")
    where = where_of(wheres, keys)
    field = ".".join(str(k) for k in keys)
    kind = details["type"]
    if kind == "extra_forbidden":
        parent = _model_at(model, keys[:-1])
        inside = f" in '{'.'.join(map(str, keys[:-1]))}'" if keys[1:] else ""
        key = str(keys[-1])
        shown = key if len(key) <= _LONGEST_KEY else key[:_LONGEST_KEY] + "..."
        return Problem(where, f"unknown key '{shown}'{inside}", did_you_mean(key, _names(parent)))
    if kind == "missing":
        return Problem(where_of(wheres, keys[:-1]), f"'{field}' is missing", _about(model, keys))
    value = details["input"]
    if kind in _WANTED:
        hint = "write {} for the defaults" if _empty_section(model, keys, value) else _about(model, keys)
        return Problem(where, f"'{field}' must be {_WANTED[kind]}, not {_shown(value)}", hint)
    if kind == "literal_error":
        expected = details["ctx"]["expected"].replace("'", "")
        return Problem(where, f"'{field}' must be {expected}, not {_shown(value)}")
    if kind == "value_error":
        return Problem(where, f"'{field}' {details['ctx']['error']}")
    said = details["msg"][:1].lower() + details["msg"][1:].replace("Input", "input")
    return Problem(where, f"'{field}' is {_shown(value)}: {said}", _about(model, keys))


def _empty_section(model: type[BaseModel], keys: Keys, value: object) -> bool:
    """Whether a section was left empty that could stand with its defaults."""
    section = _model_at(model, keys)
    needs = any(field.is_required() for field in section.model_fields.values()) if section else True
    return value is None and not needs


def _shown(value: object) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return f"{kind_of(value)} ({value!r})" if len(str(value)) < 60 else kind_of(value)
    return kind_of(value)


def _names(model: type[BaseModel] | None) -> list[str]:
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _about(model: type[BaseModel], keys: Keys) -> str:
    """The field's own documentation."""
    parent = _model_at(model, keys[:-1])
    for name, field in parent.model_fields.items() if parent else ():
        if keys[-1] in (name, field.alias):
            return (field.description or "").rstrip(".")
    return ""


def _model_at(model: type[BaseModel], keys: Keys) -> type[BaseModel] | None:
    """The section that `keys` lead to, None when they lead to something else."""
    current: type[BaseModel] | None = model
    for key in keys:
        if current is None or isinstance(key, int):
            continue
        field = {f.alias or n: f for n, f in current.model_fields.items()}.get(key)
        current = _section_in(field.annotation) if field else None
    return current


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    holders = (typing.Union, types.UnionType, list)
    inner = typing.get_args(annotation) if typing.get_origin(annotation) in holders else ()
    return next((found for found in map(_section_in, inner) if found), None)
