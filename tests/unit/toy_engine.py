"""A deterministic engine in a function: the same answer from any point on, in vLLM's stream format.

Its answer to a prompt is one fixed text, cut into fixed tokens of one to three characters. Asked to go on
from some text, it says what comes after it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.mocker.wire import StopScanner

ALPHABET = " ab\n\n  cdé\U0001f600"
LENGTH = 160
EOS_AFTER = 60
PROMPT_TOKENS = 7
FIRST_ID = 1000


def _draw(number: int, below: int) -> int:
    return crc32(b"%d" % number) % below


FULL = "".join(ALPHABET[_draw(i, len(ALPHABET))] for i in range(LENGTH))


def _bounds() -> list[int]:
    ends = [0]
    while ends[-1] < LENGTH - 3:
        ends.append(ends[-1] + 1 + _draw(7 * ends[-1], 3))
    return ends


BOUNDS = _bounds()
"""Where tokens end; the first is 0."""


def encode(text: str) -> range:
    """Whole tokens in the beginning of the answer."""
    return range(sum(bound <= len(text) for bound in BOUNDS) - 1)


@dataclass
class Answer:
    """What a client would read of a stream."""

    text: str
    roles: int
    finishes: list[str]
    dones: int
    ids: list[int]
    heads: set[tuple[Any, ...]]
    usage: dict[str, Any] | None
    errors: int


def serve(request: dict[str, Any], leg: int = 1) -> list[bytes]:
    """The events of a streamed answer."""
    chat = "messages" in request
    said = _said(request, chat)
    start = len(said)
    first = len(encode(said))
    options = request.get("stream_options") or {}
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or (10**6 if chat else 16)
    stops = [request["stop"]] if isinstance(request.get("stop"), str) else request.get("stop") or []
    out = _Writer(request, chat, leg, first + PROMPT_TOKENS, options)
    if chat:
        out.opening()
    keep = request.get("include_stop_str_in_output")
    scanner = _Including(stops) if stops and keep else StopScanner(stops) if stops else None
    position, made = start, 0
    while True:
        token = len(encode(FULL[:position])) + 1
        piece, position = FULL[position : BOUNDS[token]], BOUNDS[token]
        made += 1
        stopped = False
        reason = "stop" if token >= EOS_AFTER else "length" if made >= limit else ""
        if scanner is not None:
            piece, stopped = scanner.feed(piece)
            if reason and not stopped:
                piece += scanner.rest()
        out.token(piece, FIRST_ID + token, "stop" if stopped else reason, made)
        if stopped or reason:
            break
    out.end(made)
    return out.events


class _Including:
    """A scanner that shows the stop string and holds nothing back."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._text = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        before = len(self._text)
        self._text += piece
        ends = [at + len(s) for s in self._stops if (at := self._text.find(s)) >= 0]
        return (self._text[before : min(ends)], True) if ends else (piece, False)

    def rest(self) -> str:
        return ""


def _said(request: dict[str, Any], chat: bool) -> str:
    if chat:
        last = request["messages"][-1]
        if not request.get("continue_final_message"):
            assert last["role"] == "user"
            return ""
        assert request["add_generation_prompt"] is False
        said: str = last["content"].removeprefix("Well:")
        assert said == said.rstrip()
        assert FULL.startswith(said)
        return said
    prompt = request["prompt"]
    if isinstance(prompt, list):
        ids = [token for token in prompt if token >= FIRST_ID]
        return FULL[: BOUNDS[len(ids)]]
    said = str(prompt).removeprefix("P:")
    assert FULL.startswith(said)
    return said


class _Writer:
    def __init__(
        self, request: dict[str, Any], chat: bool, leg: int, prompt: int, options: dict[str, Any]
    ) -> None:
        self.events: list[bytes] = []
        self._chat = chat
        self._prompt = prompt
        self._usage = bool(options.get("include_usage"))
        self._continuous = bool(options.get("continuous_usage_stats"))
        self._ids = bool(request.get("return_token_ids"))
        self._head = {"id": f"x-{leg}", "object": "o", "created": leg, "model": "m"}

    def _send(self, choices: list[dict[str, Any]], made: int, usage: bool, **more: Any) -> None:
        chunk = {**self._head, "choices": choices, **more}
        if usage:
            total = self._prompt + made
            chunk["usage"] = {
                "prompt_tokens": self._prompt,
                "completion_tokens": made,
                "total_tokens": total,
                "prompt_tokens_details": {"cached_tokens": self._prompt - 1},
            }
        self.events.append(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def opening(self) -> None:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        more = {"prompt_token_ids": list(range(PROMPT_TOKENS))} if self._ids else {}
        self._send([choice], 0, self._continuous, **more)

    def token(self, text: str, token: int, reason: str, made: int) -> None:
        choice: dict[str, Any] = {"index": 0}
        choice.update({"delta": {"content": text}} if self._chat else {"text": text})
        choice.update({"logprobs": None, "finish_reason": reason or None, "stop_reason": None})
        if self._ids:
            choice["token_ids"] = [token]
            if made == 1 and not self._chat:
                choice["prompt_token_ids"] = list(range(PROMPT_TOKENS))
        self._send([choice], made, self._continuous)

    def end(self, made: int) -> None:
        if self._usage:
            self._send([], made, usage=True)
        self.events.append(b"data: [DONE]\n\n")


def framed(events: list[bytes]) -> bytes:
    """As one chunk each, with the last chunk."""
    return b"".join(map(frame_chunk, events)) + LAST_CHUNK


def read(payload: bytes) -> Answer:
    """Read a whole stream as a strict client does."""
    answer = Answer("", 0, [], 0, [], set(), None, 0)
    parts = payload.decode().split("\n\n")
    assert parts.pop() == ""
    for part in parts:
        assert part.startswith("data: "), part
        assert not answer.dones
        if part == "data: [DONE]":
            answer.dones += 1
            continue
        chunk = json.loads(part.removeprefix("data: "))
        if "error" in chunk:
            answer.errors += 1
            continue
        answer.heads.add(tuple(chunk[name] for name in ("id", "object", "created", "model")))
        answer.usage = chunk.get("usage") or answer.usage
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            answer.roles += "role" in delta
            answer.text += choice.get("text") or delta.get("content") or ""
            answer.ids += choice.get("token_ids") or []
            if choice["finish_reason"]:
                answer.finishes.append(choice["finish_reason"])
    return answer
