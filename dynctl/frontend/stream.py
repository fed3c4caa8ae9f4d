"""A streamed answer on its way from an engine to the client: bytes through, as few steps per token as can be.

The engine's own framing is passed on. Nothing goes to the client before the first server-sent event is there,
so an engine that answers 200 and then an error can still be replaced by another.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Protocol

import msgspec

from dynctl.frontend.accounts import Account
from dynctl.frontend.cutter import REASON, Cutter, finished, unframed
from dynctl.frontend.lane import lane
from dynctl.frontend.whole import USAGE, cached_tokens
from dynctl.http.framing import LAST_CHUNK, Framing, frame_chunk
from dynctl.http.server import Exchange
from dynctl.protocol.sse import framed, split_events

_DATA = b"data: "
_DONE = b"data: [DONE]"
_EVENT_ENDS = (b"\n\n", b"\n\r\n")
_CHUNK_ENDS = (b"\n\n\r\n", b"\n\r\n\r\n")
_FIRST_EVENT_BYTES = 16 * 1024
"""A first event is waited for up to this size, where nothing is kept."""
_EVENT_BYTES = 4 * 1024 * 1024
"""A longer event is passed on before it is whole, and what is kept is given up."""
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
    a `keeper` the client gets whole events in whole chunks only; what it got is kept in `pieces` until the
    keeper takes it. `unkept`: why what the client got is not known. `framing` as in `http.stream.Stream`.

    The one look: a piece that ends as a token mostly does (`_usual`) is whole and has no finish in it. `_cut`
    reads all other pieces; None = what comes is passed on as it is.
    """

    __slots__ = (
        "_account",
        "_cut",
        "_exchange",
        "_framing",
        "_held",
        "_keeper",
        "_lane",
        "_lessons",
        "_owed",
        "_ways",
        "feed",
        "refusal",
        "unkept",
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
        self._ways = ways
        self._keeper = None if framing == "length" else keeper
        self._framing = framing
        self._lessons = _LESSONS
        self._held = self._owed = b""
        self._cut = Cutter(framing) if self._keeper is not None else None
        self._lane = lane(exchange, account.itl, self._unusual, self._fold, _KEPT_PIECES, _NEVER)
        self.feed = self._lane.feed
        """Takes what came."""
        if self._keeper is None:
            self._lane.pieces = deque(maxlen=_LAST_PIECES)
        self.refusal = ""
        self.unkept = "" if self._keeper is not None else "its engine announced how long it is"

    @property
    def begun(self) -> bool:
        """Whether the client has been sent anything."""
        return self._lane.last_s > 0.0

    @property
    def kept(self) -> bool:
        """Whether all that the client was sent is known, and ends with a whole event."""
        return self._keeper is not None

    @property
    def pieces(self) -> list[bytes] | deque[bytes]:
        """What the client got and no keeper has taken; the last ones only, where there is none."""
        return self._lane.pieces

    @property
    def events(self) -> int:
        """Events that look like a token's, so far."""
        return self._lane.events

    def _unusual(self, data: bytes) -> None:
        if self.refusal:
            return
        if self._cut is None:
            self._first(data)
            return
        whole = self._whole(data, self._cut) if self._keeper is not None else self._all(data, self._cut)
        if whole:
            self._pass(whole)

    def _pass(self, whole: bytes) -> None:
        if not self._lane.last_s:
            self._begin(whole)
            return
        keeper, usual = self._keeper, self._lane.usual
        self._lane.usual = b""
        self.feed(whole)
        if self._keeper is keeper and self._cut is not None:
            self._lane.usual = usual

    def _whole(self, data: bytes, cut: Cutter) -> bytes:
        """What can go to the client: all up to the last event's end, and no refusal. Holds back the rest."""
        events, clean = cut.take(data)
        if _TROUBLE.search(events) and self._refuses(events):
            return b""
        if clean and (not cut.over or finished(events)):
            if self._lessons:
                self._lessons -= 1
                self._lane.usual = _tail(data)
            return data
        self._lane.usual = _NEVER
        self._lessons = _LESSONS
        if cut.held > _EVENT_BYTES:
            self._keep_no_more(f"one event of it is over {_EVENT_BYTES // 2**20} MiB")
            events += cut.take_all()
        if cut.over:
            self._owed = LAST_CHUNK
        return self._framed(events)

    def _all(self, data: bytes, cut: Cutter) -> bytes:
        """All that has come, framed anew, up to a chunk's end: from there on what comes is passed on."""
        payload = cut.take_all(data)
        if cut.over:
            self._owed = LAST_CHUNK
        elif cut.between:
            self._cut, self._lane.usual = None, b""
        return self._framed(payload)

    def _framed(self, payload: bytes) -> bytes:
        return frame_chunk(payload) if payload and self._framing == "chunked" else payload

    def _refuses(self, events: bytes) -> bool:
        """Whether one of these events is a refusal: those before it are passed on, if any were before."""
        each, _ = split_events(events)
        for number, one in enumerate(each):
            if _REFUSED.search(one) and not (self._lane.last_s and _CLIENTS_FAULT.search(one)):
                before = self._framed(b"".join(each[:number]))
                if before and self._lane.last_s:
                    self._pass(before)
                self._refuse(one)
                return True
        return False

    def _refuse(self, told: bytes) -> None:
        self.refusal = _excerpt(told)
        self._lane.usual = _NEVER
        self._ways.give_up()

    def _keep_no_more(self, why: str) -> None:
        assert self._cut is not None
        self._keeper = None
        self.unkept = why
        self._lane.pieces = deque(self.pieces, maxlen=_LAST_PIECES)
        # Half an event that is held back, or half a chunk, goes before what comes next.
        self._lane.usual = _NEVER
        if self._cut.between:
            self._cut, self._lane.usual = None, b""

    def _fold(self) -> None:
        assert self._keeper is not None
        pieces = list(self.pieces)
        if self._keeper.keep(pieces[:-_LAST_PIECES]):
            self._lane.pieces = pieces[-_LAST_PIECES:]
        else:
            self._keep_no_more("it is too long")

    def _first(self, data: bytes) -> None:
        """Wait for the first event, where nothing is kept."""
        self._held += data
        ended = _FIRST_END.search(self._held)
        if ended is None and len(self._held) < _FIRST_EVENT_BYTES:
            return
        if _REFUSED.search(self._held):
            self._refuse(self._held)
            return
        self._lane.usual = b""
        self._begin(self._held)

    def _begin(self, data: bytes) -> None:
        self._ways.first_token()
        self._ways.head()
        self._held = b""
        self._lane.last_s = monotonic()
        self._account.first_byte(self._lane.last_s)
        self._lane.events = data.count(_DATA) - len(_OPENING.findall(data))
        if data:
            self._lane.pieces.append(data)
            self._exchange.write(data)

    @property
    def ended_early(self) -> bool:
        """Whether the engine's stream has ended without a finish: only asked of those that are kept."""
        if self._keeper is None or self._cut is None:
            return False
        last, rest = self._last(), self._cut.last()
        if rest is None:
            return True
        if REASON.search(last):  # chunk sizes between can hide one, not make one
            return False
        told = unframed(last) if self._framing == "chunked" else last
        return not finished(told + rest)

    def complete(self) -> None:
        """The engine's answer has ended as it should: end ours."""
        if not self._lane.last_s:
            self._begin(self._held)
        self.count_tokens()
        rest = self._framed(self._cut.take_all()) if self._cut is not None else b""
        if rest or self._owed:
            self._exchange.write(rest + self._owed)
        self._exchange.end()

    def break_off(self, error: bytes) -> None:
        """The engine is lost: tell the client so by a last event, where the framing still allows one."""
        ends = _CHUNK_ENDS if self._framing == "chunked" else _EVENT_ENDS
        if self._framing != "length" and (self._keeper is not None or self._last().endswith(ends)):
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


def _excerpt(data: bytes) -> str:
    return data[:300].decode("utf-8", "replace").strip()
