"""Puts an engine's numbered batches in order: live ones, replayed ones, gaps, restarts. Pure.

The caller owns the sockets: it feeds what arrives and carries out the actions it gets back, in order. Rules
as measured on vLLM's publisher: numbers rise by one from 0 per publisher, a replay answers with all batches
kept from a number on and then an end mark, and a slow reader may lose the tail of a replay with its mark.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import msgspec

_KEPT_LIVE = 100_000
"""Live batches kept while a replay runs; the oldest go first and then show as a gap."""
_TRIES = 3
"""Replays in a row without one new batch before the gap is given up."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The next batch in order."""

    seq: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class AskReplay:
    """Ask the replay socket for all batches from `start` on; a replay under way is void."""

    start: int


@dataclass(frozen=True, slots=True)
class Reset:
    """Batches are gone for good: forget what was learnt before the next Deliver."""

    reason: str


Action = Deliver | AskReplay | Reset


class _Stamp(msgspec.Struct, array_like=True):
    timestamp: float


class EngineOrder:
    """The order of one publisher's batches. `next` is the number expected, `replaying` whether one runs."""

    def __init__(self, *, can_replay: bool) -> None:
        self.next = 0
        self.replaying = False
        self._can_replay = can_replay
        self._last_payload: bytes | None = None
        self._live: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_LIVE)
        self._answers = 0
        self._progress = False
        self._hole = False
        self._fruitless = 0

    def start(self) -> list[Action]:
        """Begin, the subscription being made already. Also asks for what a quiet publisher may have sent."""
        if not self._can_replay or self.replaying:
            return []
        return [self._ask()]

    def live(self, seq: int, payload: bytes) -> list[Action]:
        """A batch came from the publisher."""
        if self.replaying:
            self._live.append((seq, payload))
            return []
        if seq == self.next:
            return [self._accept(seq, payload)]
        if seq < self.next:
            return self._older(seq, payload)
        if self._can_replay:
            self._live.append((seq, payload))
            self._fruitless = 0
            return [self._ask()]
        return [self._lost(seq), self._accept(seq, payload)]

    def replayed(self, seq: int, payload: bytes) -> list[Action]:
        """One answer of the replay that runs."""
        if not self.replaying:
            return []
        self._answers += 1
        if self._hole or seq < self.next:
            return []
        if seq == self.next:
            self._fruitless = 0
            return [self._accept(seq, payload)]
        if self._answers > 1:
            self._hole = True
            return []
        self._fruitless = 0
        return [self._lost(seq), self._accept(seq, payload)]

    def replay_ended(self) -> list[Action]:
        """The end mark came."""
        if not self.replaying:
            return []
        if self._hole:
            return self._try_again()
        self.replaying = False
        return self._flush(gave_nothing=not self._progress)

    def replay_failed(self) -> list[Action]:
        """The replay did not end in time."""
        return self._try_again() if self.replaying else []

    def _try_again(self) -> list[Action]:
        self._fruitless += 1
        if self._fruitless < _TRIES:
            return [self._ask()]
        self.replaying = False
        return self._flush(gave_nothing=True)

    def _flush(self, *, gave_nothing: bool) -> list[Action]:
        """Go on with the live batches that waited for the replay."""
        actions: list[Action] = []
        waiting, self._live = self._live, deque(maxlen=_KEPT_LIVE)
        if waiting and gave_nothing and waiting[0][0] > self.next:
            actions.append(self._lost(waiting[0][0]))
        for seq, payload in waiting:
            actions.extend(self.live(seq, payload))
        return actions

    def _older(self, seq: int, payload: bytes) -> list[Action]:
        """A number seen before: a repeat, or, with a newer time, a publisher that began anew."""
        last = self._last_payload
        if last is None or _timestamp(payload) <= _timestamp(last):
            return []
        reason = f"the publisher began anew: batch {seq} after {self.next - 1}"
        self.next = 0
        self._last_payload = None
        self._fruitless = 0
        return [Reset(reason), *self.live(seq, payload)]

    def _ask(self) -> AskReplay:
        self.replaying = True
        self._answers = 0
        self._progress = False
        self._hole = False
        return AskReplay(self.next)

    def _accept(self, seq: int, payload: bytes) -> Deliver:
        self.next = seq + 1
        self._progress = True
        self._last_payload = payload
        return Deliver(seq, payload)

    def _lost(self, seq: int) -> Reset:
        reason = f"batches {self.next} to {seq - 1} are gone"
        self.next = seq
        return Reset(reason)


def _timestamp(payload: bytes) -> float:
    """The batch's time, its first element; 0 when it has none."""
    try:
        return msgspec.msgpack.decode(payload, type=_Stamp).timestamp
    except msgspec.DecodeError:
        return 0.0
