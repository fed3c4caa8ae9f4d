"""A YAML file as plain values with the line of each, refusing what YAML lets pass in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dynctl.errors import RecipeError

MAX_FILE_BYTES = 1024 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 50

Keys = tuple[str | int, ...]
"""A place in a document: mapping keys and list indices from the root."""

_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """SafeLoader that leaves dates as the strings they were written as."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own attribute, replaced as a whole)
        first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True, slots=True)
class Document:
    """Values, and for each of them where it came from ("file:line")."""

    data: dict[str, Any]
    wheres: Mapping[Keys, str]


def read_document(path: Path) -> Document:
    """Read a YAML file whose root is a mapping. Raises RecipeError naming file and line."""
    text = _read_text(path)
    wheres: dict[Keys, str] = {}
    data = parse_yaml(text, str(path), wheres)
    if data is None:
        raise RecipeError("the file is empty", where=str(path), hint="a mapping of keys is needed")
    if not isinstance(data, dict):
        raise RecipeError(f"must be a mapping of keys, not {kind_of(data)}", where=f"{path}:1")
    return Document(data, wheres)


def parse_yaml(text: str, name: str, wheres: dict[Keys, str] | None = None) -> Any:
    """The value of one YAML document; None for an empty one. Raises RecipeError naming `name` and the line.

    `wheres` is filled with the place of every value.
    """
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError("broken YAML: unprintable character", where=f"{name}:{line}") from error
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        return _Constructor(name, {} if wheres is None else wheres).value(node, ())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"broken YAML: {problem}", where=f"{name}:{line}") from error
    except RecursionError as error:
        raise RecipeError("nested too deeply", where=name, hint=f"at most {MAX_DEPTH} levels") from error
    finally:
        loader.dispose()


def kind_of(value: object) -> str:
    """What a value is, in the words of YAML."""
    names = {
        dict: "a mapping",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a whole number",
        float: "a number",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise RecipeError("is a directory", where=str(path), hint="a YAML file is needed")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError("no such file", where=str(path)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RecipeError(f"cannot be read: {reason}", where=str(path)) from error
    if len(raw) > MAX_FILE_BYTES:
        raise RecipeError("the file is too large", where=str(path), hint=f"at most {MAX_FILE_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError("is not UTF-8 text", where=f"{path}:{line}") from error


class _Constructor:
    """Builds values from nodes and notes their lines."""

    def __init__(self, name: str, wheres: dict[Keys, str]) -> None:
        self._name = name
        self._wheres = wheres
        self._nodes = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def value(self, node: yaml.Node, at: Keys) -> Any:
        """The value of a node. Raises RecipeError for tags, duplicate keys, and documents without end."""
        self._nodes += 1
        if self._nodes > MAX_NODES or len(at) > MAX_DEPTH:
            hint = f"at most {MAX_NODES} values in {MAX_DEPTH} levels"
            raise RecipeError("the document is too large", where=self._place(node), hint=hint)
        self._wheres.setdefault(at, self._place(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(child, (*at, i)) for i, child in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, at: Keys) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError("a key must be a word", where=self._place(key_node))
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise RecipeError("merge keys (<<) are not supported", where=self._place(key_node))
            key: str = key_node.value
            if key in made:
                first = self._wheres[(*at, key)].rsplit(":", 1)[-1]
                hint = f"first given in line {first}"
                raise RecipeError(f"duplicate key '{key}'", where=self._place(key_node), hint=hint)
            self._wheres[(*at, key)] = self._place(key_node)
            made[key] = self.value(value_node, (*at, key))
        return made

    def _scalar(self, node: yaml.Node) -> Any:
        if node.tag not in _TAGS:
            raise RecipeError(f"the tag {node.tag} is not supported", where=self._place(node))
        try:
            value = self._scalars.construct_object(node)
        except (ValueError, LookupError) as error:
            raise RecipeError(f"'{node.value}' is not of the type given", where=self._place(node)) from error
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"'{node.value}' is not a finite number", where=self._place(node))
        return value

    def _place(self, node: yaml.Node) -> str:
        return f"{self._name}:{node.start_mark.line + 1}"
