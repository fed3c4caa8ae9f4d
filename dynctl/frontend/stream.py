"""A streamed answer on its way from an engine to the client: bytes through, as few steps per token as can be.

The engine's own framing is passed on. Nothing goes to the client before the first server-sent event is there,
so an engine that answers 200 and then an error can still be replaced by another.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

import msgspec

from dynctl.frontend.accounts import Account
from dynctl.frontend.whole import USAGE, cached_tokens
from dynctl.http.framing import LAST_CHUNK, ChunkReader, Framing, frame_chunk
from dynctl.http.server import Exchange
from dynctl.protocol.sse import framed, split_events

_DATA = b"data: "
_EVENT_END = b"\n\n"
_DONE = b"data: [DONE]"
_FIRST_EVENT_BYTES = 16 * 1024
_NEVER = b"\0"
_LAST_PIECES = 4
_KEPT_PIECES = 1024
"""Pieces kept as they are, about as many tokens, before the keeper takes them."""
_TAIL_BYTES = 96
_LESSONS = 8
"""How many events are looked at for how they end, before it is taken to differ from token to token."""
_NO_FINISH = re.compile(rb'"finish_reason": ?null[^\n]*\s*\Z')
_FIRST_END = re.compile(rb"\n\n|\r\n\r\n")
_REFUSED = re.compile(
    rb'data: ?\{\s*"error": ?[^n\s]|data: ?\{\s*"object": ?"error"|"finish_reason": ?"abort"'
)
_TROUBLE = re.compile(rb'"abort"|"error"')
_CLIENTS_FAULT = re.compile(rb'"code": ?"?4\d\d\b')
_FINISHED = re.compile(rb'data: ?\[DONE\]|"finish_reason": ?"|data: ?\{\s*"error": ?[^n\s]')
_OPENING = re.compile(rb'"role": ?"assistant", ?"content": ?""')


class Load(Protocol):
    """The request's place in a worker's load."""

    def first_token(self) -> None: ...


class Ways(msgspec.Struct, frozen=True):
    """What happens once: `head` sends the answer's head and `first_token` frees load, both with the first
    event at hand; `give_up` ends the engine's stream when that event is a refusal.
    """

    head: Callable[[], None]
    first_token: Callable[[], None]
    give_up: Callable[[], None]


class Keeper(Protocol):
    """Keeps what a stream has said, should another worker have to go on with it."""

    def keep(self, pieces: list[bytes]) -> bool:
        """Take these pieces over. False: there is too much, nothing more is to be kept."""
        ...


class Relay:
    """Takes a body as the engine sends it and hands it on. Per piece: a look, a write, a count, a clock.

    `refusal` is set, and nothing more is written, when an event is an error of the engine's or an abort. With
    a `keeper` the client gets whole events only; what it got is kept in `pieces` until the keeper takes it.
    `framing` as in `http.stream.Stream`.

    The one look: a piece that ends as a token mostly does (`_usual`) is whole and has no finish in it.
    """

    __slots__ = (
        "_account",
        "_end",
        "_exchange",
        "_framing",
        "_held",
        "_itl",
        "_keeper",
        "_last_s",
        "_lessons",
        "_rest",
        "_usual",
        "_ways",
        "events",
        "pieces",
        "refusal",
    )

    def __init__(
        self,
        exchange: Exchange,
        account: Account,
        ways: Ways,
        keeper: Keeper | None = None,
        framing: Framing = "chunked",
    ) -> None:
        self._exchange = exchange
        self._account = account
        self._itl = account.itl
        self._ways = ways
        self._keeper = None if framing == "length" else keeper
        self._framing = framing
        self._end = _EVENT_END
        self._usual = _NEVER
        self._lessons = _LESSONS
        self._held = self._rest = b""
        self._last_s = 0.0
        self.pieces: list[bytes] | deque[bytes] = deque(maxlen=_LAST_PIECES)
        if self._keeper is not None:
            self.pieces = []
        self.events = 0
        self.refusal = ""

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._last_s > 0.0

    @property
    def kept(self) -> bool:
        """Whether all that the client was sent is known, and ends with a whole event."""
        return self._keeper is not None

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if not data.endswith(self._usual):
            self._unusual(data)
            return
        self._exchange.write(data)
        now_s = monotonic()
        events = data.count(_DATA)
        if events:
            self.events += events
            waited_s, itl = now_s - self._last_s, self._itl
            # `itl.observe`, without a call for each token.
            itl.counts[bisect_left(itl.bounds, waited_s / events)] += events
            itl.total += waited_s
            self._last_s = now_s
        pieces = self.pieces
        pieces.append(data)
        if len(pieces) == _KEPT_PIECES:
            self._fold()

    def _unusual(self, data: bytes) -> None:
        if self.refusal:
            return
        if not self._last_s:
            self._first(data)
            return
        whole = self._whole(data)
        if whole:
            self._usual, usual = b"", self._usual
            self.feed(whole)
            if self._keeper is not None:
                self._usual = usual

    def _whole(self, data: bytes) -> bytes:
        """What can go to the client: all up to the last event's end, and no refusal. Holds back the rest."""
        if self._keeper is None:
            return data
        if self._rest:
            data, self._rest = self._rest + data, b""
        if data.endswith(self._end) and not _TROUBLE.search(data):
            if self._lessons:
                self._lessons -= 1
                self._usual = _tail(data)
            return data
        cut = data.rfind(self._end) + len(self._end) if self._end in data else 0
        if len(data) - cut > _FIRST_EVENT_BYTES:
            self._keep_no_more()
            return data
        whole, self._rest = data[:cut], data[cut:]
        if self._rest == LAST_CHUNK and _FINISHED.search(whole) and not _TROUBLE.search(whole):
            self._rest = b""
            return data
        self._usual = _NEVER
        self._lessons = _LESSONS
        if _TROUBLE.search(whole):
            return self._before_refusal(whole)
        return whole

    def _before_refusal(self, whole: bytes) -> bytes:
        """The events before one that is a refusal, framed anew; all, when none is one."""
        payload = unframed(whole) if self._framing == "chunked" else whole
        events, _ = split_events(payload)
        for number, one in enumerate(events):
            if _REFUSED.search(one) and not _CLIENTS_FAULT.search(one):
                self._refuse(one)
                before = b"".join(events[:number])
                return frame_chunk(before) if before and self._framing == "chunked" else before
        return whole

    def _refuse(self, told: bytes) -> None:
        self.refusal = _excerpt(told)
        self._rest = b""
        self._usual = _NEVER
        self._ways.give_up()

    def _keep_no_more(self) -> None:
        self._keeper = None
        self._usual = b""
        self.pieces = deque(self.pieces, maxlen=_LAST_PIECES)

    def _fold(self) -> None:
        assert self._keeper is not None
        pieces = list(self.pieces)
        if self._keeper.keep(pieces[:-_LAST_PIECES]):
            self.pieces = pieces[-_LAST_PIECES:]
        else:
            self._keep_no_more()

    def _first(self, data: bytes) -> None:
        self._held += data
        ended = _FIRST_END.search(self._held)
        if ended is None and len(self._held) < _FIRST_EVENT_BYTES:
            return
        if _REFUSED.search(self._held):
            self._refuse(self._held)
            return
        end = ended.group() if ended is not None else _EVENT_END
        self._end = end + b"\r\n" if self._framing == "chunked" else end
        self._begin()

    def _begin(self) -> None:
        self._ways.first_token()
        self._ways.head()
        held, self._held = self._held, b""
        self._last_s = monotonic()
        self._account.first_byte(self._last_s)
        if self._keeper is None:
            self._usual = b""
        whole = self._whole(held)
        self.events = whole.count(_DATA) - len(_OPENING.findall(whole))
        if whole:
            self.pieces.append(whole)
            self._exchange.write(whole)

    @property
    def ended_early(self) -> bool:
        """Whether the engine's stream has ended without a finish: only asked of those that are kept."""
        return self._keeper is not None and not _FINISHED.search(self._held + self._last() + self._rest)

    def complete(self) -> None:
        """The engine's answer has ended as it should: end ours."""
        if not self._last_s:
            self._begin()
        self.count_tokens()
        if self._rest:
            self._exchange.write(self._rest)
        self._exchange.end()

    def break_off(self, error: bytes) -> None:
        """The engine is lost: tell the client so by a last event, where the framing still allows one."""
        if self._framing != "length" and (self._keeper is not None or self._last().endswith(self._end)):
            last = framed(error)
            self._exchange.write(frame_chunk(last) + LAST_CHUNK if self._framing == "chunked" else last)
            self._exchange.end()
        else:
            self._exchange.abort()

    def count_tokens(self) -> None:
        """Put what has come so far down to the account: however the stream ends, tokens were made."""
        last = self._last()
        usage = USAGE.findall(last)
        # Without usage: one event a token, but for a chat's opening and the closing [DONE].
        self._account.output_tokens = int(usage[-1]) if usage else self.events - last.count(_DONE)
        if usage:
            self._account.cached_tokens = cached_tokens(last)

    def _last(self) -> bytes:
        return b"".join(list(self.pieces)[-_LAST_PIECES:])


def _tail(event: bytes) -> bytes:
    """How this event ends, from a finish that has not come yet; what ends no piece when it has none."""
    found = _NO_FINISH.search(event, max(0, len(event) - _TAIL_BYTES))
    return found.group() if found is not None else _NEVER


def unframed(data: bytes) -> bytes:
    """The payload of whole chunks."""
    payload: list[bytes] = []
    ChunkReader().feed(data, payload)
    return b"".join(payload)


def _excerpt(data: bytes) -> str:
    return data[:300].decode("utf-8", "replace").strip()
