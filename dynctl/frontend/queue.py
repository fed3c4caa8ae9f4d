"""Requests that wait for a worker, and whose turn it is. Pure: the clock is passed in.

fcfs: by arrival, each step of priority being worth a second. shortest: by the most (1 + priority) / tokens to
compute, the weighted shortest processing time first. In either the longest waiting one has every
`FAIR_TURN`-th turn, so whoever is in the queue is out after at most so many turns for each that came before.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field

from dynctl.errors import Overloaded
from dynctl.protocol.specs import QueueSpec

FAIR_TURN = 4
LONGEST_RETRY_S = 120.0
_NEWEST = 0.2
_SPARE = 64


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that may have to wait: prompt tokens (0 = unknown), those cached somewhere, its priority."""

    tokens: int = 0
    cached: int = 0
    priority: int = 0


@dataclass(slots=True, eq=False)
class Place:
    """A place in the queue, until `gone`: its turn has come, or it was given up."""

    ask: Ask
    gone: bool = False


@dataclass(slots=True)
class Totals:
    """What waits now."""

    requests: int = 0
    tokens: int = 0
    cached: int = 0

    def count(self, ask: Ask, sign: int) -> None:
        """Count a request in (1) or out (-1)."""
        self.requests += sign
        self.tokens += sign * ask.tokens
        self.cached += sign * ask.cached


@dataclass(slots=True)
class Queue:
    """The queue of one frontend. `waiting` may be read at any time."""

    spec: QueueSpec
    waiting: Totals = field(default_factory=Totals)
    _ranked: list[tuple[float, int, Place]] = field(default_factory=list)
    _by_arrival: deque[Place] = field(default_factory=deque)
    _joined: int = 0
    _turns: int = 0
    _last_turn_s: float | None = None
    _between_s: float = 1.0

    @property
    def full(self) -> bool:
        """Whether no further request may wait, however short."""
        return self.waiting.requests >= self.spec.limit

    def join(self, ask: Ask, now_s: float) -> Place:
        """A place for the request. Raises Overloaded when the queue is full."""
        if self.full or self._too_many_tokens(ask):
            raise self.refusal()
        if not self.waiting.requests:
            self._last_turn_s = now_s
        place = Place(ask)
        self._joined += 1
        heapq.heappush(self._ranked, (self._rank(ask, now_s), self._joined, place))
        self._by_arrival.append(place)
        self.waiting.count(ask, 1)
        return place

    def leave(self, place: Place) -> None:
        """Give a place up; nothing happens when its turn has come."""
        if place.gone:
            return
        self._take_out(place)

    def next(self, now_s: float) -> Place | None:
        """Whose turn it is, from now on out of the queue; None when nobody waits."""
        if not self.waiting.requests:
            return None
        self._turns += 1
        place = self._oldest() if self._turns % FAIR_TURN == 0 else self._best()
        self._take_out(place)
        if self._last_turn_s is not None:
            self._between_s += _NEWEST * (now_s - self._last_turn_s - self._between_s)
        self._last_turn_s = now_s
        return place

    def _take_out(self, place: Place) -> None:
        """It waits no more; either order may keep it until most of what is in them has gone."""
        place.gone = True
        self.waiting.count(place.ask, -1)
        most = 2 * self.waiting.requests + _SPARE
        if len(self._ranked) > most:
            self._ranked = [entry for entry in self._ranked if not entry[2].gone]
            heapq.heapify(self._ranked)
        if len(self._by_arrival) > most:
            self._by_arrival = deque(one for one in self._by_arrival if not one.gone)

    def retry_after_s(self) -> float:
        """When there should be room again: as long as it takes those who wait now, at the pace of late."""
        return min(LONGEST_RETRY_S, max(1.0, self._between_s * self.waiting.requests))

    def refusal(self) -> Overloaded:
        """What to tell a request that may not wait."""
        waiting = self.waiting
        told = "all workers are busy"
        if waiting.requests and self.full:
            told = f"{told} and {waiting.requests} requests wait already"
        elif waiting.requests:
            told = f"{told} and requests of {waiting.tokens} prompt tokens in all wait already"
        return Overloaded(told, retry_after_s=self.retry_after_s(), hint="send it again later")

    def _too_many_tokens(self, ask: Ask) -> bool:
        """A prompt longer than the limit itself may wait alone: refusing it would be for good."""
        limit, waiting = self.spec.limit_tokens, self.waiting
        return bool(limit and waiting.requests and waiting.tokens + ask.tokens > limit)

    def _rank(self, ask: Ask, now_s: float) -> float:
        """The lower, the sooner."""
        if self.spec.policy == "fcfs":
            return now_s - ask.priority
        weight = 1.0 + ask.priority if ask.priority >= 0 else 1.0 / (1.0 - ask.priority)
        return -weight / max(1, ask.tokens - ask.cached)

    def _best(self) -> Place:
        while True:
            place = heapq.heappop(self._ranked)[2]
            if not place.gone:
                return place

    def _oldest(self) -> Place:
        while True:
            place = self._by_arrival.popleft()
            if not place.gone:
                return place
