"""A streamed answer as its bytes come: when tokens came, what the server counted, how it ended. Pure but for
the clock that is passed in.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from dynctl.http.framing import ChunkReader
from dynctl.protocol.sse import DONE, event_data, split_events

_SAID = re.compile(rb'"(?:content|text|reasoning_content|reasoning|arguments)":\s?"(?!")')
"""A piece of an answer that is not empty. Inside a JSON string its quotes would be escaped."""
_TELLS = re.compile(rb'"usage":\s?\{|"finish_reason":\s?"|"error":\s?[{"]|\[DONE\]|"message":')
"""An event that is worth decoding."""


class Answer:
    """A sink for the body of an answer. `times`: when each piece came that was not empty, by the clock.

    `usage` is what the server counted, {} = nothing; `finish` why it ended; `error` what it said went wrong;
    `whole` whether its end came. With `keep` the text is kept, in `said`.
    """

    __slots__ = ("_chunks", "_clock", "_keep", "_tail", "error", "finish", "said", "times", "usage", "whole")

    def __init__(self, clock: Callable[[], float], *, chunked: bool, keep: bool = False) -> None:
        self._clock = clock
        self._chunks = ChunkReader() if chunked else None
        self._keep = keep
        self._tail = b""
        self.times: array[float] = array("d")
        self.usage: dict[str, Any] = {}
        self.finish = ""
        self.error = ""
        self.said: list[str] = []
        self.whole = False

    def feed(self, data: bytes) -> None:
        """More bytes, however they are cut."""
        now_s = self._clock()
        if self._chunks is not None:
            pieces: list[bytes] = []
            self._chunks.feed(data, pieces)
            data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        events, self._tail = split_events(self._tail + data if self._tail else data)
        for event in events:
            if _SAID.search(event):
                self.times.append(now_s)
            if self._keep or _TELLS.search(event):
                self._look(event)

    def _look(self, event: bytes) -> None:
        told = event_data(event)
        if told == DONE:
            self.whole = True
            return
        try:
            found = msgspec.json.decode(told, type=dict[str, Any]) if told else {}
        except msgspec.DecodeError:
            self.error = f"an event that is no JSON object: {told[:200].decode(errors='replace')}"
            return
        if found.get("error"):
            self.error = error_text(found)
        usage = found.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        for choice in found.get("choices") or ():
            self.finish = choice.get("finish_reason") or self.finish
            if self._keep:
                delta = choice.get("delta") or {}
                self.said.append(delta.get("content") or choice.get("text") or "")

    def counted(self, name: str) -> int:
        """What the server counted of prompt_tokens, completion_tokens; 0 when it did not."""
        value = self.usage.get(name)
        return value if isinstance(value, int) else 0

    @property
    def cached(self) -> int | None:
        """Prompt tokens that the server found in its cache; None = it does not tell."""
        details = self.usage.get("prompt_tokens_details")
        value = details.get("cached_tokens") if isinstance(details, dict) else None
        return value if isinstance(value, int) else None


def error_text(found: dict[str, Any]) -> str:
    """What an OpenAI error body says."""
    said = found.get("error", found)
    return str(said.get("message") or said) if isinstance(said, dict) else str(said)
