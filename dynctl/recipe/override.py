"""Changes laid over a recipe before it is checked: recipe < environment < flags.

`--set a.b=v` and `--unset a.b`, a.b being keys or list indices; v is YAML. The environment variable
DYNCTL_SET holds such assignments, one a line or separated by ";".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynctl.errors import RecipeError
from dynctl.recipe.problems import did_you_mean
from dynctl.recipe.source import Document, Keys, kind_of, parse_yaml

VARIABLE = "DYNCTL_SET"


@dataclass(frozen=True, slots=True)
class Override:
    """One change; `value` None with `unset` removes. `where` tells the user where it came from."""

    path: str
    text: str
    where: str
    unset: bool = False


def collect(environ: Mapping[str, str], sets: Sequence[str], unsets: Sequence[str]) -> list[Override]:
    """All overrides, weakest first. Raises RecipeError for one without "=" or path."""
    found = []
    for part in environ.get(VARIABLE, "").replace("\n", ";").split(";"):
        if part.strip():
            found.append(_assignment(part.strip(), f"{VARIABLE} {part.strip()}"))
    found.extend(_assignment(text, f"--set {text}") for text in sets)
    found.extend(Override(path.strip(), "", f"--unset {path}", unset=True) for path in unsets)
    return found


def apply(document: Document, overrides: Sequence[Override]) -> Document:
    """A new document with the changes made. Raises RecipeError for a path that cannot be."""
    if not overrides:
        return document
    data = _copy(document.data)
    wheres = dict(document.wheres)
    for override in overrides:
        keys: Keys = tuple(override.path.split("."))
        if "" in keys:
            raise RecipeError("no field named", where=override.where, hint="--set a.b=value, --unset a.b")
        reached = _change(data, keys, override)
        for known in [k for k in wheres if k[: len(reached)] == reached]:
            del wheres[known]
        if not override.unset:
            wheres[reached] = override.where
            for depth in range(1, len(reached)):
                # Sections that only this change has made: a fault in their name is a fault of the change.
                wheres.setdefault(reached[:depth], override.where)
    return Document(data, wheres)


def _assignment(text: str, where: str) -> Override:
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError("is not an assignment", where=where, hint="a.b=value is needed")
    return Override(path.strip(), value, where)


def _change(data: dict[str, Any], keys: Keys, override: Override) -> Keys:
    """Make one change in place; the path in terms of keys and indices."""
    at: Any = data
    reached: Keys = ()
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(at, list):
            at_key: str | int = _index(at, str(key), override, appending=last)
        elif isinstance(at, dict):
            at_key = key
        else:
            shown = ".".join(map(str, reached))
            raise RecipeError(f"'{shown}' is {kind_of(at)}, it has no '{key}'", where=override.where)
        reached = (*reached, at_key)
        if last:
            _put(at, at_key, override)
        else:
            at = _step(at, at_key, override)
    return reached


def _put(at: Any, key: str | int, override: Override) -> None:
    if override.unset:
        if isinstance(at, dict) and key not in at:
            raise RecipeError(f"'{override.path}' is not set", where=override.where, hint=_given(at))
        del at[key]
        return
    value = parse_yaml(override.text, override.where)
    if isinstance(key, int) and key == len(at):
        at.append(value)
    else:
        at[key] = value


def _step(at: Any, key: str | int, override: Override) -> Any:
    if isinstance(at, list):
        return at[int(key)]
    if at.get(key) is None:
        if override.unset:
            raise RecipeError(f"'{override.path}' is not set", where=override.where, hint=_given(at))
        at[key] = {}
    return at[key]


def _index(at: list[Any], key: str, override: Override, *, appending: bool) -> int:
    limit = len(at) + (1 if appending and not override.unset else 0)
    if not key.isascii() or not key.isdigit() or int(key) >= limit:
        hint = f"an index from 0 to {limit - 1}" if limit else "the list is empty"
        raise RecipeError(f"'{key}' is no place in that list", where=override.where, hint=hint)
    return int(key)


def _given(at: Mapping[str, Any]) -> str:
    return did_you_mean("", at)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
