"""A client's JSON body: what the frontend reads of it, and the few fields it may change.

Top-level values stay the client's own bytes (`msgspec.Raw`) unless a field is set or dropped here, so what
the frontend does not know reaches the engine verbatim.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import msgspec

from dynctl.errors import RequestError

T = TypeVar("T")

Prompt = str | list[int | str | list[int]]
Message = dict[str, msgspec.Raw]

_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_MESSAGES = msgspec.json.Decoder(list[Message])
_PROMPT: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Prompt | None)
_VALUES: dict[Any, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind | None) for kind in (bool, int, str, dict, list, object)
}
_NULL = b"null"
_WHOLE = re.compile(rb"-?\d{1,18}")
_PROMPTS = ("prompt", "prompt_embeds")
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "a string",
    dict: "an object",
    list: "an array",
}


_EXCERPT_CHARS = 200
_LARGE_BYTES = 64 * 1024
_MOST_FIELDS = 1024
_FLAT = re.compile(rb"\[\s*-?\d")
_NESTED = re.compile(rb"\[\s*\[")


def excerpt(text: str) -> str:
    """A client's own words as errors and logs may repeat them: not at any length."""
    return text if len(text) <= _EXCERPT_CHARS else f"{text[:_EXCERPT_CHARS]}…"


class Body:
    """One request body. `original` is what the client sent, byte for byte."""

    __slots__ = ("fields", "images", "messages", "original", "prompt")

    def __init__(self, original: bytes, fields: dict[str, msgspec.Raw]) -> None:
        self.original = original
        self.fields = fields
        self.messages: list[Message] | None = None
        self.prompt: Prompt | None = None
        self.images: list[str] | None = None

    @classmethod
    def parse(cls, data: bytes) -> Body:
        """Split the top level. Raises RequestError for bytes that are no JSON object."""
        try:
            fields = _FIELDS.decode(data)
        except msgspec.ValidationError as error:
            raise RequestError("the body must be a JSON object", hint=str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        except RecursionError as error:
            raise RequestError("the body is nested too deeply") from error
        if len(fields) > _MOST_FIELDS:
            raise RequestError(f"the body has {len(fields)} fields", hint=f"at most {_MOST_FIELDS}")
        return cls(data, fields)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        raw = self.fields.get(name)
        return raw is not None and bytes(raw) != _NULL

    def get(self, name: str, kind: type[T]) -> T | None:
        """The field as `kind` (bool, int, str, dict, list), None when absent or null.

        Raises RequestError that names the field.
        """
        raw = self.fields.get(name)
        return None if raw is None else field_value(raw, kind, name)

    def without(self, names: Iterable[str]) -> Body:
        """This body, with `names` taken out; itself when it has none of them."""
        present = [name for name in names if name in self.fields]
        if not present:
            return self
        kept = {name: raw for name, raw in self.fields.items() if name not in present}
        return Body(msgspec.json.encode(kept), kept)

    def opened(self) -> dict[str, Any]:
        """A new dict an engine's request contract may work on.

        Whole numbers, true, false, null and arrays that are a prompt are decoded, since contracts look at
        them; other values are still the client's bytes.
        """
        return {name: _opened(name, raw) for name, raw in self.fields.items()}


def _opened(name: str, raw: msgspec.Raw) -> Any:
    view = memoryview(raw)
    first = view[0]
    decoded = first in b"tfn" or (first in b"-0123456789" and _WHOLE.fullmatch(view))
    return msgspec.json.decode(raw) if decoded or (first in b"[" and name in _PROMPTS) else raw


def encode(fields: Mapping[str, Any]) -> bytes:
    """JSON bytes; `msgspec.Raw` values verbatim."""
    return msgspec.json.encode(fields)


def field_value(raw: msgspec.Raw, kind: type[T], name: str) -> T | None:
    """Decode one value. Raises RequestError that names `name` and says what it should be."""
    try:
        value: T | None = _VALUES[kind].decode(raw)
        return value
    except msgspec.ValidationError as error:
        raise RequestError(f"`{name}` must be {_WORDS.get(kind, 'valid')}", where=name) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"`{name}` is not JSON: {error}", where=name) from error


def messages(body: Body) -> list[Message]:
    """The chat messages, top level of each split. Raises RequestError naming the message at fault.

    To be read only: they are read once for all who ask.
    """
    if body.messages is None:
        body.messages = _messages(body)
    return body.messages


def _messages(body: Body) -> list[Message]:
    raw = body.fields.get("messages")
    if raw is None:
        raise RequestError("`messages` is missing", where="messages")
    try:
        found = _MESSAGES.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"`messages` must be an array of objects: {error}", where="messages") from error
    if not found:
        raise RequestError("`messages` must not be empty", where="messages")
    for number, message in enumerate(found):
        where = f"messages[{number}].role"
        role = message.get("role")
        if role is None or not field_value(role, str, where):
            raise RequestError(f"`{where}` must be a string", where=where)
    return found


def tokens_at_least(body: Body) -> int:
    """How many token ids a large prompt of them has, without reading them; 0 = it is none, or is small."""
    raw = body.fields.get("prompt")
    data = b"" if raw is None or len(memoryview(raw)) < _LARGE_BYTES else bytes(raw)
    return data.count(b",") + 1 if _FLAT.match(data) else 0


def messages_at_least(body: Body) -> int:
    """How many chat messages there are in a large array of them, without reading them; 0 = it is small."""
    raw = body.fields.get("messages")
    if raw is None or len(memoryview(raw)) < _LARGE_BYTES:
        return 0
    try:
        return len(msgspec.json.decode(raw, type=list[msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return 0


def large_batch(body: Body) -> bool:
    """Whether the prompt is several large arrays of token ids: the engine's to read, not ours."""
    raw = body.fields.get("prompt")
    data = b"" if raw is None or len(memoryview(raw)) < _LARGE_BYTES else bytes(raw)
    return _NESTED.match(data) is not None and data.count(b"]") > 2


def prompt(body: Body) -> Prompt | None:
    """The completion prompt, None when there is none. Raises RequestError when it is no prompt.

    To be read only: it is read once for all who ask.
    """
    if body.prompt is None:
        body.prompt = _prompt(body)
    return body.prompt


def _prompt(body: Body) -> Prompt | None:
    raw = body.fields.get("prompt")
    if raw is None:
        return None
    try:
        found: Prompt | None = _PROMPT.decode(raw)
        return found
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            "`prompt` must be a string, an array of strings, or one or more arrays of token ids",
            where="prompt",
        ) from error
