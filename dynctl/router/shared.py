"""Blocks that running requests hold on each worker, shared ones counted once.

A request holds a whole prefix, so on each worker the held blocks form trees. That makes three things cheap: a
prompt's held part ends where it ends (no holes), a new request adds only what lies beyond that end, and one
that leaves takes with it only its own tail, up to the first block that another request still needs. What one
request alone holds, mostly the larger part of its prompt, is kept as that: its hashes from a position on.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat

import msgspec

from dynctl.kv.walk import walk


# gc=False: numbers only, so it can be part of no cycle.
class _Tail(msgspec.Struct, frozen=True, gc=False):
    """Blocks that one request at `place` alone holds: its `hashes` from `start` on."""

    hashes: Sequence[int]
    start: int
    place: int

    def common(self, hashes: Sequence[int], at: int) -> int:
        """How many blocks it begins with that `hashes` has from `at` on: equal hashes have equal prefixes."""
        own, start = self.hashes, self.start
        most = range(min(len(own) - start, len(hashes) - at))
        return bisect_left(most, True, key=lambda i: own[start + i] != hashes[at + i])


class SharedBlocks:
    """Which blocks are held where. A place is a small number from `open`, given back with `close`.

    Neighbouring blocks that the same places hold share one mask object: a walk tells them by identity.
    """

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._tails: dict[int, _Tail] = {}
        self._needs: list[dict[int, int]] = []
        self._free: list[int] = []

    def __len__(self) -> int:
        """How many different blocks are held, wherever."""
        return len(self._masks) + sum(len(tail.hashes) - tail.start for tail in self._tails.values())

    def open(self) -> int:
        """A new place, which holds nothing."""
        if self._free:
            return heapq.heappop(self._free)
        self._needs.append({})
        return len(self._needs) - 1

    def close(self, place: int) -> None:
        """Give a place back. Before that every `add` to it must have had its `remove`."""
        heapq.heappush(self._free, place)

    def depths(self, hashes: Sequence[int]) -> list[int]:
        """How many of `hashes`, from the start, are held, by place."""
        found = [0] * len(self._needs)
        if not hashes:
            return found
        row = hashes if isinstance(hashes, list) else list(hashes)
        end = walk(self._masks, row, self._masks.get(row[0], 0), found, shrinking=True)
        if end < len(row):
            tail = self._tails.get(hashes[end])
            if tail is not None:
                found[tail.place] = end + tail.common(hashes, end)
        return found

    def add(self, place: int, hashes: Sequence[int]) -> int:
        """Hold `hashes`, a whole prefix. Returns how many were not held there yet."""
        masks, bit, total = self._masks, 1 << place, len(hashes)
        anywhere = _first(hashes, 0, lambda h: h not in masks)
        if anywhere < total and hashes[anywhere] in self._tails:
            anywhere += self._share(hashes, anywhere)
        here = _first(hashes, 0, lambda h: not masks.get(h, 0) & bit)
        before, after = 0, bit
        for h in hashes[here:anywhere]:
            mask = masks.get(h, 0)
            if mask is not before:
                before, merged = mask, mask | bit
                after = after if merged == after else merged
            masks[h] = after
        if anywhere < total:
            self._tails[hashes[anywhere]] = _Tail(hashes, anywhere, place)
        if here:
            needs, end = self._needs[place], hashes[here - 1]
            needs[end] = needs.get(end, 0) + 1
        return total - here

    def _share(self, hashes: Sequence[int], start: int) -> int:
        """Have what `hashes` has of the tail that is there at `start` held as shared. Returns how much."""
        tail = self._tails.pop(hashes[start])
        common = tail.common(hashes, start)
        end, bit = tail.start + common, 1 << tail.place
        for h in tail.hashes[tail.start : end]:
            self._masks[h] = bit
        if end < len(tail.hashes):
            self._tails[tail.hashes[end]] = _Tail(tail.hashes, end, tail.place)
        return common

    def remove(self, place: int, hashes: Sequence[int]) -> int:
        """End one `add` of the same hashes. Returns how many are held no more."""
        masks, bit = self._masks, 1 << place
        kept = self._still_needed(place, hashes)
        end = _first(hashes, kept, lambda h: h not in masks)
        gone = 0
        if end < len(hashes):
            tail = self._tails.get(hashes[end])
            if tail is not None and tail.place == place:
                del self._tails[hashes[end]]
                gone = len(tail.hashes) - tail.start
        alone = bisect_left(hashes, True, kept, end, key=lambda h: masks.get(h, bit) == bit)
        own = hashes[alone:end]
        if set(map(masks.get, own)) == {bit}:
            deque(map(masks.pop, own, repeat(0)), maxlen=0)
            return gone + len(own) + self._leave(bit, hashes[kept:alone])
        return gone + self._leave(bit, hashes[kept:end])

    def _leave(self, bit: int, hashes: Sequence[int]) -> int:
        """Take `bit` off these, one by one. Returns of how many it was on."""
        masks, gone = self._masks, 0
        before, after = bit, 0
        for h in hashes:
            mask = masks.get(h, 0)
            if mask & bit:
                gone += 1
                if mask is not before:
                    before, after = mask, mask ^ bit
                if after:
                    masks[h] = after
                else:
                    del masks[h]
        return gone

    def _still_needed(self, place: int, hashes: Sequence[int]) -> int:
        """How many of the first `hashes` other requests hold there; one of these needs this end no more."""
        needs = self._needs[place]
        end = next(filter(needs.__contains__, reversed(hashes)), None) if needs else None
        if end is None:
            return 0
        others = needs[end]
        if others > 1:
            needs[end] = others - 1
        else:
            del needs[end]
        return len(hashes) - next(i for i, h in enumerate(reversed(hashes)) if h == end)


def _first(hashes: Sequence[int], start: int, absent: Callable[[int], bool]) -> int:
    """The first position from `start` on whose hash is absent; from there on all are."""
    return bisect_left(hashes, True, start, key=absent)
