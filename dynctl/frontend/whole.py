"""What an engine's whole answer says, and the same answer as a stream. Pure."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from dynctl.errors import EngineFailed
from dynctl.protocol.sse import LAST_EVENT, event

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')
_ABORTED = re.compile(rb'"finish_reason": ?"abort"')


def output_tokens(body: bytes) -> int:
    """Completion tokens as the usage of a whole answer tells them; 0 when it does not."""
    usage = USAGE.findall(body[-4096:])
    return int(usage[-1]) if usage else 0


def cached_tokens(body: bytes) -> int:
    """Prompt tokens the engine had cached, as the usage of an answer tells; -1 when it does not."""
    told = _CACHED.findall(body[-4096:])
    return int(told[-1]) if told else -1


def is_refusal(body: bytes) -> bool:
    """Whether a 200 answer is an engine's way to say that it drains: every choice aborted, without text."""
    if not _ABORTED.search(body):
        return False
    try:
        choices = msgspec.json.decode(body, type=dict[str, Any]).get("choices")
    except msgspec.DecodeError:
        return False
    if not isinstance(choices, list) or not choices:
        return False
    return all(
        isinstance(choice, dict) and choice.get("finish_reason") == "abort" and not _text(choice)
        for choice in choices
    )


def _text(choice: dict[str, Any]) -> object:
    message = choice.get("message")
    return choice.get("text") or (message.get("content") if isinstance(message, dict) else None)


def as_events(answer: bytes, *, usage: bool) -> bytes:
    """A whole answer as the stream a client asked for. Raises EngineFailed for an answer that is none.

    Needed when an engine's prefill leg has already given the whole answer. `usage`: send the usage event too.
    """
    try:
        whole = msgspec.json.decode(answer, type=dict[str, Any])
        choices = [dict(choice) for choice in whole["choices"]]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        raise EngineFailed("the engine's answer has no choices") from error
    chat = whole.get("object") == "chat.completion"
    for choice in choices:
        choice.pop("disaggregated_params", None)
        if chat:
            choice["delta"] = choice.pop("message", {})
    base: dict[str, Any] = {
        name: whole[name] for name in ("id", "object", "created", "model") if name in whole
    }
    if chat:
        base["object"] = "chat.completion.chunk"
    events: list[dict[str, Any]] = [{**base, "choices": choices}]
    if usage and "usage" in whole:
        events.append({**base, "choices": [], "usage": whole["usage"]})
    return b"".join(map(event, events)) + LAST_EVENT
