"""Who holds which blocks, of one tier: block hash → a set of places, in the order blocks came.

A place is a small number. Compiled where it can be (`native/holders.c`: 16 bytes a block and its slots in a
hash table, no objects), else in Python, which does the same.
"""

from __future__ import annotations

import secrets
from itertools import islice

from dynctl.kv.walk import places_of, python_walk
from dynctl.native import load


class PythonHolders:
    """`place` holds nothing until `add`. Hashes: unsigned 64 bit. Repeated calls change nothing."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}
        self._held: dict[int, set[int]] = {}

    def __len__(self) -> int:
        """Blocks that anyone holds; one that several hold is one."""
        return len(self._masks)

    def add(self, place: int, hashes: list[int]) -> None:
        """`place` holds these now."""
        masks, get, bit = self._masks, self._masks.get, 1 << place
        before, after = 0, bit
        for h in hashes:
            mask = get(h, 0)
            if mask != before:
                before, after = mask, mask | bit
            masks[h] = after
        self._held.setdefault(place, set()).update(hashes)

    def discard(self, place: int, hashes: list[int]) -> None:
        """`place` holds these no more."""
        for h in hashes:
            self._take(h, 1 << place)
        self._held.get(place, set()).difference_update(hashes)

    def _take(self, h: int, bit: int) -> None:
        mask = self._masks.get(h, 0)
        if mask == bit:
            del self._masks[h]
        elif mask & bit:
            self._masks[h] = mask ^ bit

    def count(self, place: int) -> int:
        """Blocks that `place` holds."""
        return len(self._held.get(place, ()))

    def get(self, h: int) -> int:
        """Who holds a block, one bit a place."""
        return self._masks.get(h, 0)

    def evict(self, most: int) -> int:
        """Forget the oldest blocks, at most so many. Returns how many."""
        oldest = list(islice(self._masks, max(0, most)))
        for h in oldest:
            for place in places_of(self._masks.pop(h)):
                self._held[place].discard(h)
        return len(oldest)

    def touch(self, hashes: list[int]) -> None:
        """Those of these that are there are the youngest now. What is no hash of 64 bits ends a prompt."""
        for h in hashes:
            mask = self._masks.pop(h, 0)
            if mask:
                self._masks[h] = mask

    def clear(self, place: int, budget: int) -> int:
        """Have `place` hold nothing, in portions: `budget` is how many blocks are seen to at most. Nothing is
        to be added there before it holds none. Returns what is left of the budget, 0 = maybe more to do.
        """
        held = self._held.get(place, set())
        while held and budget > 0:
            self._take(held.pop(), 1 << place)
            budget -= 1
        return max(0, budget)

    def walk(self, hashes: list[int], alive: bytes, size: int) -> list[int]:
        """How many of `hashes`, from the start and without a hole, each place in `alive` holds: `size`
        depths, by place; places beyond are left out. `alive`: one bit a place, little-endian. Nobody holds
        what is no hash of 64 bits.
        """
        mask = int.from_bytes(alive, "little")
        found = [0] * max(size, mask.bit_length())
        python_walk(self._masks.get, hashes, mask, found)
        return found[:size]


def holders() -> load.Holders:
    """None hold anything."""
    if load.compiled is not None:
        return load.compiled.Holders(secrets.randbits(64))
    return PythonHolders()
