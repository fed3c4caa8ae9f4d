"""What a stream has told its client, over all legs, as its events tell it. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from dynctl.protocol.sse import DONE, event_data, split_events

Json = dict[str, Any]

_HEAD = ("id", "object", "created", "model")
_REASONING = ("reasoning_content", "reasoning")


class Said:
    """What one stream has told its client. `feed` takes payload bytes, `take` one decoded chunk.

    `head`: what names the first chunk. `tokens`: the ids of what was said, None as soon as a chunk with text
    did not carry them; `silent`: the last of them, whose text was not told (yet). `fields`: those of a chunk
    that carry reasoning here. `beats`: for each event of the present leg that may have been a token, how many
    characters (of reasoning and text) were told by then, and how many tokens all legs had made, 0 = not told.
    """

    __slots__ = (
        "_pending",
        "_texts",
        "_thoughts",
        "beats",
        "chars",
        "done",
        "fields",
        "finish",
        "head",
        "lasting",
        "prompt_ids",
        "role",
        "settled",
        "several",
        "shown",
        "silent",
        "spoken",
        "tokens",
        "tools",
        "unordered",
        "usage",
    )

    def __init__(self) -> None:
        self.head: Json = {}
        self.role = self.tools = self.several = self.done = self.unordered = False
        self.lasting = True
        self.finish = ""
        self.chars = self.spoken = 0
        self.tokens: list[int] | None = []
        self.silent: list[int] = []
        self.prompt_ids: list[int] | None = None
        self.usage: tuple[int, int] | None = None
        self.fields: tuple[str, ...] = ()
        self.beats: list[tuple[int, int]] = []
        self.settled = (0, 0)
        """What was taken for said when the present leg began: characters as generated, marks of reasoning and
        all, and tokens. `shown`: how many characters had been told by then, also those to be said again."""
        self.shown = 0
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._pending = b""

    @property
    def text(self) -> str:
        """All text, joined; without reasoning."""
        return _joined(self._texts)

    @property
    def thoughts(self) -> str:
        """All reasoning, joined."""
        return _joined(self._thoughts)

    @property
    def reasoning(self) -> bool:
        """Whether reasoning was told."""
        return bool(self.fields)

    @property
    def lags(self) -> bool:
        """Whether the last tokens told came without their text."""
        return bool(self.silent)

    def feed(self, payload: bytes) -> None:
        """Take server-sent events, without chunk framing; half an event at the end waits for its rest."""
        events, self._pending = split_events(self._pending + payload)
        for event in events:
            data = event_data(event)
            if data == DONE:
                self.done = True
            elif data:
                self._decode(data)

    def _decode(self, data: bytes) -> None:
        try:
            chunk = msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            chunk = None
        if isinstance(chunk, dict):
            self.take(chunk)
        else:
            self.lasting = False

    def take(self, chunk: Json) -> None:
        """Take one chunk the client was sent. One of unknown shape makes `lasting` false."""
        try:
            self._take(chunk)
        except (KeyError, TypeError, AttributeError, ValueError):
            self.lasting = False

    def beat(self) -> None:
        """A token may have been made of which the client was told nothing."""
        self.beats.append((self.chars, 0))

    def settle(self, chars: int, tokens: int) -> None:
        """Another leg begins. So many characters as generated, and tokens, are taken for said."""
        self.settled, self.shown = (chars, tokens), self.chars
        self.beats.clear()
        self.silent = []

    def _take(self, chunk: Json) -> None:
        if not self.head:
            self.head = {name: chunk[name] for name in _HEAD if name in chunk}
        usage = chunk.get("usage")
        made = 0
        if usage:
            made = int(usage.get("completion_tokens") or 0)
            self.usage = (int(usage["prompt_tokens"]), made)
        self.prompt_ids = chunk.get("prompt_token_ids") or self.prompt_ids
        for choice in chunk.get("choices") or ():
            self._choice(choice, made)

    def _choice(self, choice: Json, made: int) -> None:
        delta = choice.get("delta") or {}
        self.several |= bool(choice.get("index"))
        self.role |= bool(delta.get("role"))
        self.tools |= bool(delta.get("tool_calls") or delta.get("function_call"))
        self.prompt_ids = choice.get("prompt_token_ids") or self.prompt_ids
        thought = self._thought(delta)
        text = delta.get("content") if delta else choice.get("text")
        ids = choice.get("token_ids")
        if text:
            self._texts.append(text + "")
        told = len(thought) + len(text or "")
        self.chars += told
        self.spoken += bool(told)
        if self.tokens is not None and ids:
            self.tokens.extend(ids)
            self.silent = [] if told else [*self.silent, *ids]
        elif told:
            self.tokens = None
        self.finish = choice.get("finish_reason") or self.finish
        if told or not (delta.get("role") or choice.get("finish_reason")):
            self.beats.append((self.chars, made))

    def _thought(self, delta: Json) -> str:
        """The reasoning a chunk tells; an engine may tell the same in two fields, for older clients."""
        told = tuple(name for name in _REASONING if delta.get(name))
        if not told:
            return ""
        thought: str = delta[told[0]] + ""
        self.unordered |= bool(self._texts)
        self.fields = self.fields or told
        self._thoughts.append(thought)
        return thought


def _joined(texts: list[str]) -> str:
    if len(texts) > 1:
        texts[:] = ["".join(texts)]
    return texts[0] if texts else ""
