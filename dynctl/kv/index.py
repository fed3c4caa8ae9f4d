"""Which worker holds which blocks: sequence hash → one bit per (worker, rank), per tier.

A bit stands for a *slot*. Forgetting a key is immediate whatever it held: its slot is retired (its bit
counts for nothing any more) and the key gets a fresh one; `sweep` clears the retired bits in portions, and
only a slot that is clean is given out again.

The number of blocks is bounded: beyond `limit` those stored longest ago go first, from all workers at once;
`touch` makes blocks young again. A worker that holds more than it can be remembered for is thus known by what
is in use.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dynctl.kv.walk import places_of, python_walk, walk
from dynctl.protocol.kv_events import KvEvent, Removed, Stored, Tier

SlotKey = tuple[str, int]
"""(worker id, data-parallel rank)."""

DEFAULT_LIMIT = 8_000_000
EVICTED_AT_ONCE = 1024
_OWN_TIER: tuple[Tier, ...] = ("G1",)


@dataclass(slots=True)
class _Slot:
    """One bit, the key it stands for, and the hashes it is set for, by tier."""

    number: int
    bit: int
    key: SlotKey
    held: dict[Tier, set[int]] = field(default_factory=dict)


class Index:
    """The blocks of all workers, at most `limit` of them (a block in two tiers is two). Repeated events
    change nothing.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._slots: dict[SlotKey, _Slot] = {}
        self._by_number: list[_Slot] = []
        self._free: list[int] = []
        self._retired: list[_Slot] = []
        self._live = 0
        self._masks: dict[Tier, dict[int, int]] = {"G1": {}}
        self.evicted = 0
        self.generation = 0
        """Another number whenever a key has got, or lost, its slot."""

    def __len__(self) -> int:
        """Blocks remembered; one that several workers hold is one."""
        return sum(map(len, self._masks.values()))

    def apply(self, key: SlotKey, event: KvEvent) -> None:
        """Take over one event of `key`; a key not seen before starts empty."""
        if isinstance(event, Stored):
            self._store(key, event.tier, event.hashes)
        elif isinstance(event, Removed):
            self._remove(key, event.tier, event.hashes)
        else:
            self.reset(key)

    def _store(self, key: SlotKey, tier: Tier, hashes: Sequence[int]) -> None:
        slot = self._slots.get(key) or self._open(key)
        masks = self._masks.setdefault(tier, {})
        held = slot.held.setdefault(tier, set())
        bit, get = slot.bit, masks.get
        before, after = 0, bit
        for h in hashes:
            mask = get(h, 0)
            if mask != before:
                before, after = mask, mask | bit
            masks[h] = after
        held.update(hashes)
        while len(self) > self._limit:
            self._evict()

    def _evict(self) -> None:
        """Forget the oldest blocks of the largest tier."""
        tier = max(self._masks, key=lambda one: len(self._masks[one]))
        masks = self._masks[tier]
        oldest = list(islice(masks, min(EVICTED_AT_ONCE, max(1, self._limit // 8))))
        for h in oldest:
            for number in places_of(masks.pop(h)):
                self._by_number[number].held[tier].discard(h)
        self.evicted += len(oldest)

    def touch(self, hashes: Iterable[int]) -> None:
        """These are in use: of the G1 blocks they are to go last. Does nothing while there is much room."""
        masks = self._masks["G1"]
        if len(self) * 8 > self._limit * 7:
            for h in hashes:
                mask = masks.pop(h, 0)
                if mask:
                    masks[h] = mask

    def _remove(self, key: SlotKey, tier: Tier, hashes: Iterable[int]) -> None:
        slot = self._slots.get(key)
        held = slot.held.get(tier) if slot is not None else None
        if slot is None or not held:
            return
        masks, bit = self._masks[tier], slot.bit
        get = masks.get
        for h in hashes:
            mask = get(h, 0)
            if mask == bit:
                del masks[h]
            elif mask & bit:
                masks[h] = mask ^ bit
        held.difference_update(hashes)

    def reset(self, key: SlotKey) -> None:
        """Forget what `key` holds, in all tiers. Takes the same time whatever it held."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._live &= ~slot.bit
            self.generation += 1
            self._retired.append(slot)

    def remove_worker(self, worker: str) -> None:
        """Forget all ranks of `worker`."""
        for key in [key for key in self._slots if key[0] == worker]:
            self.reset(key)

    def match(
        self,
        hashes: Sequence[int],
        keys: Iterable[SlotKey] | None = None,
        tiers: Sequence[Tier] = _OWN_TIER,
    ) -> dict[SlotKey, int]:
        """How many blocks from the start of `hashes`, without a hole, each key holds in any of `tiers`.

        Keys that hold not even the first block are left out. `keys` None = all.
        """
        alive = self._live if keys is None else self._bits(keys)
        slots = self._by_number
        return {slots[i].key: depth for i, depth in enumerate(self._walk(hashes, alive, tiers)) if depth}

    def depths(self, hashes: Sequence[int], tiers: Sequence[Tier] = _OWN_TIER) -> list[int]:
        """`match` for all keys, by the numbers that `places` gives. The last entry is 0."""
        return self._walk(hashes, self._live, tiers)

    def places(self, keys: Iterable[SlotKey]) -> list[int]:
        """Where each of `keys` is in `depths`, while `generation` stays the same."""
        slots = self._slots
        return [slots[key].number if key in slots else -1 for key in keys]

    def _walk(self, hashes: Sequence[int], alive: int, tiers: Sequence[Tier]) -> list[int]:
        """Depths by slot number, of the slots in `alive`; one entry more is for whoever has no slot."""
        found = [0] * (len(self._by_number) + 1)
        row = hashes if isinstance(hashes, list) else list(hashes)
        there = [masks for tier in tiers if (masks := self._masks.get(tier)) is not None]
        if len(there) == 1:
            walk(there[0], row, alive, found)
        else:
            python_walk(_anywhere(there), row, alive, found)
        return found

    @property
    def tiered(self) -> bool:
        """Whether blocks are, or were, held in other tiers than G1."""
        return len(self._masks) > 1

    def _bits(self, keys: Iterable[SlotKey]) -> int:
        bits = 0
        for key in keys:
            slot = self._slots.get(key)
            if slot is not None:
                bits |= slot.bit
        return bits

    def stats(self, tier: Tier = "G1") -> dict[SlotKey, int]:
        """Blocks held in `tier`, by key."""
        return {key: len(slot.held.get(tier, ())) for key, slot in self._slots.items()}

    @property
    def dirty(self) -> bool:
        """Whether `sweep` has still bits of forgotten keys to clear."""
        return bool(self._retired)

    def sweep(self, budget: int) -> bool:
        """Clear up to `budget` bits of forgotten keys. Returns whether some are left."""
        while self._retired and budget > 0:
            slot = self._retired[-1]
            for tier, held in slot.held.items():
                masks, bit = self._masks[tier], slot.bit
                while held and budget > 0:
                    _clear(masks, held.pop(), bit)
                    budget -= 1
            if not any(slot.held.values()):
                self._retired.pop()
                heapq.heappush(self._free, slot.number)
        return bool(self._retired)

    def _open(self, key: SlotKey) -> _Slot:
        """A clean slot for `key`, the lowest there is so that masks stay narrow."""
        number = heapq.heappop(self._free) if self._free else len(self._by_number)
        slot = self._slots[key] = _Slot(number, 1 << number, key)
        self._by_number[number : number + 1] = [slot]
        self._live |= slot.bit
        self.generation += 1
        return slot


def _clear(masks: dict[int, int], h: int, bit: int) -> None:
    """Take `bit` out of the mask of `h`; a hash that nobody holds is dropped."""
    mask = masks[h] & ~bit
    if mask:
        masks[h] = mask
    else:
        del masks[h]


def _anywhere(tiers: Sequence[dict[int, int]]) -> Callable[[int], int]:
    """Who holds a hash in any of several tiers."""
    gets = [masks.get for masks in tiers]

    def anywhere(h: int) -> int:
        mask = 0
        for get in gets:
            mask |= get(h, 0)
        return mask

    return anywhere
