"""A recipe's own text changed in places, so that comments stay: sections, overrides, whole paths. Pure.

What an override (`--set`, `--unset`, DYNCTL_SET) has changed is written where it stood; where that is not one
value in the text, its whole section is written anew, without its comments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dynctl.errors import ProfileError
from dynctl.hub import ASSETS
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.source import Keys

Edit = tuple[int, int, str]
"""(Begin, end, what is there instead)."""
_FILE = "file:"


def rewritten(text: str, loaded: LoadedRecipe, sections: Mapping[str, Any]) -> str:
    """The text of `loaded` with these top sections, all that flags changed, and whole paths.

    Raises ProfileError when it is no mapping any more.
    """
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        raise ProfileError("is no recipe any more", where=loaded.file)
    values, short = plain_values(loaded), plain_values(loaded, short=True)
    edits: dict[str, list[Edit]] = {}
    anew = dict(sections)
    for path in changed_paths(loaded.overrides):
        top = str(path[0])
        node, value = _at(root, path), _value(values, path)
        if top in anew:
            continue
        if isinstance(node, yaml.ScalarNode) and node.style not in ("|", ">") and value is not None:
            edits.setdefault(top, []).append((node.start_mark.index, node.end_mark.index, json.dumps(value)))
        else:
            anew[top] = short.get(top)
    for top, edit in _whole_paths(root, loaded, values):
        edits.setdefault(top, []).append(edit)
    made = {edit[:2]: edit for top, ones in edits.items() if top not in anew for edit in reversed(ones)}
    for begin, end, new in sorted([*made.values(), *_sections(text, root, anew)], reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def changed_paths(overrides: Sequence[str]) -> Iterator[Keys]:
    """The fields that flags and environment have changed: of "--set a.b=1", "--unset a.b"."""
    for override in overrides:
        _, _, rest = override.partition(" ")
        yield tuple(rest.partition("=")[0].strip().split("."))


def plain_values(loaded: LoadedRecipe, *, short: bool = False) -> dict[str, Any]:
    """The resolved recipe as plain values, `short`: without what is as it is by default; what comes with
    dynctl is named as it is on every machine.
    """
    values = loaded.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=short)
    path = Path(loaded.recipe.model.path)
    if path.parent == ASSETS:
        values["model"]["path"] = f"builtin:{path.name}"
    return values


def _sections(text: str, root: yaml.MappingNode, anew: Mapping[str, Any]) -> Iterator[Edit]:
    """Each section in the place of the old one, or at the end; None: there is none any more."""
    flow = bool(root.flow_style)
    for name, value in anew.items():
        entry = _entry(root, name)
        if value is None and entry is None:
            continue
        if flow:
            new = f"{json.dumps(name)}: {json.dumps(value)}"
        else:
            new = "" if value is None else _block(name, value)
        if entry is not None:
            end = entry[1].end_mark.index
            yield entry[0].start_mark.index, end, new if flow else new.rstrip("\n") + _rest(text, end)
        elif flow:
            yield root.end_mark.index - 1, root.end_mark.index - 1, f", {new}"
        else:
            end = len(text)
            yield end, end, ("" if text.endswith("\n") else "\n") + "\n" + new


def _block(name: str, value: Any) -> str:
    return yaml.safe_dump({name: value}, sort_keys=False, default_flow_style=False, allow_unicode=True)


def _rest(text: str, end: int) -> str:
    """A block's end may lie at the next key, or where its last line ends."""
    if end >= len(text):
        return "\n"
    return "\n\n" if text[end - 1] == "\n" else ""


def _whole_paths(
    root: yaml.MappingNode, loaded: LoadedRecipe, values: Mapping[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """What the text tells relative to its folder, told whole."""
    folder = Path(loaded.file).resolve().parent
    for path, node in _scalars(root, ()):
        value = _value(values, path)
        if path[:2] == ("frontend", "api_key") and node.value.startswith(_FILE):
            name = Path(node.value.removeprefix(_FILE)).expanduser()
            value = _FILE + os.path.normpath(folder / name)
        elif not isinstance(value, str) or not os.path.isabs(value):
            continue
        if node.value != value:
            yield str(path[0]), (node.start_mark.index, node.end_mark.index, json.dumps(value))


def _scalars(node: yaml.Node, at: Keys) -> Iterator[tuple[Keys, yaml.ScalarNode]]:
    if isinstance(node, yaml.ScalarNode):
        yield at, node
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _scalars(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _scalars(value, (*at, index))


def _at(root: yaml.Node, path: Keys) -> yaml.Node | None:
    node: yaml.Node | None = root
    for key in path:
        if isinstance(node, yaml.SequenceNode) and str(key).isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
        else:
            entry = _entry(node, str(key))
            node = entry[1] if entry else None
    return node


def _value(values: Any, path: Keys) -> Any:
    for key in path:
        if isinstance(values, list) and str(key).isdigit() and int(key) < len(values):
            values = values[int(key)]
        else:
            values = values.get(key) if isinstance(values, dict) else None
    return values


def _entry(node: yaml.Node | None, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((key, value) for key, value in node.value if key.value == name), None)
