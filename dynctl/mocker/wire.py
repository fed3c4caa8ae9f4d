"""The bytes of answers, made once per request so that a token costs one join. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Envelope:
    """What all bodies of one answer share. `created` is Unix time in seconds."""

    id: str
    chat: bool
    model: str
    created: int

    def head(self, *, stream: bool) -> dict[str, Any]:
        """The outer fields of a body or chunk."""
        kind = (
            "text_completion" if not self.chat else "chat.completion.chunk" if stream else "chat.completion"
        )
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def token_frame(self, index: int) -> tuple[bytes, bytes]:
        """The bytes of a chunk before and after a token's text (escaped as in a JSON string)."""
        mark = "\x00"
        text = self.chunk(index, mark)
        before, after = json.dumps(text, separators=(",", ":")).split(json.dumps(mark)[1:-1])
        return f"data: {before}".encode(), f"{after}\n\n".encode()

    def chunk(
        self, index: int, text: str, *, reason: str = "", tokens: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """One chunk with some text; with a `reason` the choice's last."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["delta"] = {"content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = None
        choice["finish_reason"] = reason or None
        if reason or not self.chat:
            choice["stop_reason"] = None
        if tokens is not None:
            choice["token_ids"] = list(tokens)
        return {**self.head(stream=True), "choices": [choice]}

    def opening(self, index: int, prompt: Sequence[int] | None) -> dict[str, Any]:
        """The first chunk of a chat's choice."""
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        chunk = {**self.head(stream=True), "choices": [choice]}
        if prompt is not None:
            chunk["prompt_token_ids"] = list(prompt)
        return chunk

    def choice(self, index: int, text: str, reason: str, tokens: Sequence[int] | None) -> dict[str, Any]:
        """One choice of a whole answer."""
        choice: dict[str, Any] = {"index": index}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "tool_calls": []}
        else:
            choice["text"] = text
        choice.update(logprobs=None, finish_reason=reason, stop_reason=None)
        if tokens is not None:
            choice["token_ids"] = list(tokens)
        return choice


def usage(prompt: int, completion: int, cached: int) -> dict[str, Any]:
    """The `usage` object, in tokens."""
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + completion,
        "completion_tokens": completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class StopScanner:
    """Finds stop strings in text that comes in pieces; holds back what may be the beginning of one."""

    __slots__ = ("_held", "_keep", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._keep = max(map(len, stops)) - 1
        self._held = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string was met (it is not shown, nor what follows)."""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self._held = ""
            return text[: min(places)], True
        cut = max(0, len(text) - self._keep)
        self._held = text[cut:]
        return text[:cut], False

    def rest(self) -> str:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held
