"""A streamed answer on its way from an engine to the client: bytes through, as few steps per token as can be.

The engine's own framing is passed on. Nothing goes to the client before the first server-sent event is there,
so an engine that answers 200 and then an error can still be replaced by another.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynctl.errors import EngineFailed
from dynctl.frontend.accounts import Account
from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.http.server import Exchange

SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]
_DATA = b"data: "
_EVENT_END = b"\n\n"
_DONE = b"data: [DONE]"
_FIRST_EVENT_BYTES = 16 * 1024
_BROKEN = re.compile(rb'data: ?\{\s*"error"|data: ?\{\s*"object": ?"error"')
_ABORTED = re.compile(rb'"finish_reason": ?"abort"')
_OPENING = re.compile(rb'"role": ?"assistant", ?"content": ?""')
_USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
_CACHED = re.compile(rb'"cached_tokens": ?(\d+)')


class Load(Protocol):
    """The request's place in a worker's load."""

    def first_token(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ways:
    """What happens once: `head` sends the answer's head and `first_token` frees load, both with the first
    event at hand; `give_up` ends the engine's stream when that event is a refusal.
    """

    head: Callable[[], None]
    first_token: Callable[[], None]
    give_up: Callable[[], None]


class Relay:
    """Takes a body as the engine sends it and hands it on. Per piece: a write, a count, a clock reading.

    `refusal` is set, and nothing is written, when the first event is an error or an abort.
    """

    __slots__ = (
        "_account",
        "_before",
        "_exchange",
        "_held",
        "_itl",
        "_last_s",
        "_tail",
        "_ways",
        "events",
        "refusal",
    )

    def __init__(self, exchange: Exchange, account: Account, ways: Ways) -> None:
        self._exchange = exchange
        self._account = account
        self._itl = account.itl
        self._ways = ways
        self._held = b""
        self._last_s = 0.0
        self._tail = self._before = b""
        self.events = 0
        self.refusal = ""

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._last_s > 0.0

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if not self._last_s:
            self._first(data)
            return
        self._exchange.write(data)
        now_s = time.monotonic()
        events = data.count(_DATA)
        if events:
            self.events += events
            self._itl.observe((now_s - self._last_s) / events, events)
            self._last_s = now_s
        self._before = self._tail
        self._tail = data

    def _first(self, data: bytes) -> None:
        if self.refusal:
            return
        self._held += data
        if _EVENT_END not in self._held and len(self._held) < _FIRST_EVENT_BYTES:
            return
        if _BROKEN.search(self._held) or _ABORTED.search(self._held):
            self.refusal = _excerpt(self._held)
            self._ways.give_up()
            return
        self._begin()

    def _begin(self) -> None:
        self._ways.first_token()
        self._ways.head()
        held, self._held = self._held, b""
        self._last_s = time.monotonic()
        self._account.first_byte(self._last_s)
        self.events = held.count(_DATA) - len(_OPENING.findall(held))
        self._tail = held
        self._exchange.write(held)

    def complete(self) -> None:
        """The engine's answer has ended as it should: end ours."""
        if not self._last_s:
            self._begin()
        self.count_tokens()
        self._exchange.end()

    def break_off(self, error_event: bytes) -> None:
        """The engine is lost: tell the client so by a last event, where the framing still allows one."""
        if self._tail.endswith(b"\n\n\r\n"):
            self._exchange.write(frame_chunk(_DATA + error_event + _EVENT_END) + LAST_CHUNK)
            self._exchange.end()
        else:
            self._exchange.abort()

    def count_tokens(self) -> None:
        """Put what has come so far down to the account: however the stream ends, tokens were made."""
        last = self._before + self._tail
        usage = _USAGE.findall(last)
        # Without usage: one event a token, but for a chat's opening and the closing [DONE].
        self._account.output_tokens = int(usage[-1]) if usage else self.events - last.count(_DONE)
        if usage:
            self._account.cached_tokens = cached_tokens(last)


def _excerpt(data: bytes) -> str:
    return data[:300].decode("utf-8", "replace").strip()


def output_tokens(body: bytes) -> int:
    """Completion tokens as the usage of a whole answer tells them; 0 when it does not."""
    usage = _USAGE.findall(body[-4096:])
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
    return b"".join(_DATA + msgspec.json.encode(event) + _EVENT_END for event in events) + b"data: [DONE]\n\n"
