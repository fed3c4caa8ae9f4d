"""Prompts that were computed lately, by where: what workers may hold whose events do not tell (yet). Pure.

A running request's prompt is known to be where it runs (`router.shared`). Here it goes on to count after its
end: for some seconds where KV events are on their way, for minutes, or until newer prompts fill the worker's
blocks, where there are none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from dynctl.protocol.specs import RouterSpec
from dynctl.router.shared import SharedBlocks

MAX_PROMPTS = 16_384
"""Remembered at one place; a prompt that comes often is there as often."""


@dataclass(frozen=True, slots=True)
class Keeping:
    """How long a place's prompts count: for `ttl_s`, and until they are more than `blocks` (0 = no limit)."""

    ttl_s: float
    blocks: int = 0


@dataclass(slots=True)
class _Place:
    """`prompts`: (when it ends, hashes), oldest first. `held`: their blocks, equal ones once."""

    number: int
    keeping: Keeping
    prompts: deque[tuple[float, Sequence[int]]] = field(default_factory=deque)
    held: int = 0


class Recent:
    """The recent prompts of all places; at most `limit` blocks, equal ones at one place counted once.

    Over that the oldest prompts of the place that holds most are dropped.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._blocks = SharedBlocks()
        self._places: dict[int, _Place] = {}
        self._held = 0
        self._next_end = inf

    def open(self, keeping: Keeping) -> int:
        """A new place; its number is its index in `depths`."""
        number = self._blocks.open()
        self._places[number] = _Place(number, keeping)
        return number

    def close(self, number: int) -> None:
        """Forget a place and all of its prompts."""
        place = self._places.pop(number)
        while place.prompts:
            self._drop(place)
        self._blocks.close(number)

    def keep(self, number: int, keeping: Keeping) -> None:
        """From now on `keeping` holds for this place; prompts that are there keep their end."""
        self._places[number].keeping = keeping

    def remember(self, number: int, hashes: Sequence[int], since_s: float, now_s: float) -> None:
        """A prompt has been computed there; its time counts from `since_s`. A closed place is passed over."""
        place = self._places.get(number)
        if place is None or not hashes or since_s + place.keeping.ttl_s <= now_s:
            return
        end = since_s + place.keeping.ttl_s
        place.prompts.append((end, hashes))
        added = self._blocks.add(number, hashes)
        place.held += added
        self._held += added
        self._next_end = min(self._next_end, end)
        room = place.keeping.blocks
        while len(place.prompts) > MAX_PROMPTS or (room and place.held > room):
            self._drop(place)
        while self._held > self._limit:
            self._drop(max(self._places.values(), key=lambda one: one.held))

    def depths(self, hashes: Sequence[int], now_s: float) -> list[int] | None:
        """How many of `hashes`, from the start, count at each place; None = none anywhere."""
        if now_s >= self._next_end:
            self._expire(now_s)
        return self._blocks.depths(hashes) if self._held else None

    @property
    def held(self) -> int:
        """Blocks remembered; equal ones once for each place."""
        return self._held

    def _expire(self, now_s: float) -> None:
        for place in self._places.values():
            while place.prompts and place.prompts[0][0] <= now_s:
                self._drop(place)
        ends = (place.prompts[0][0] for place in self._places.values() if place.prompts)
        self._next_end = min(ends, default=inf)

    def _drop(self, place: _Place) -> None:
        _, hashes = place.prompts.popleft()
        gone = self._blocks.remove(place.number, hashes)
        place.held -= gone
        self._held -= gone


def keeping(spec: RouterSpec, tells: bool, capacity: int) -> Keeping:
    """How long the prompts of a worker count that `tells` of its cache by events, or does not.

    `capacity`: its KV blocks, 0 = not known (yet).
    """
    if not guessed(spec, tells):
        return Keeping(spec.predicted_ttl_s if tells else 0.0)
    if spec.approximate_cache == "lru" and capacity:
        return Keeping(inf, capacity)
    return Keeping(spec.approximate_ttl_s, capacity)


def guessed(spec: RouterSpec, tells: bool) -> bool:
    """Whether what a worker holds is guessed from past choices alone."""
    return spec.events == "approximate" or (spec.events == "auto" and not tells)
