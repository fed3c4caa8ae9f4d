"""Which worker holds which blocks: sequence hash → one bit per (worker, rank), per tier.

A bit stands for a *slot*. Forgetting a key is immediate whatever it held: its slot is retired (its bit
counts for nothing any more) and the key gets a fresh one; `sweep` clears the retired bits in portions, and
only a slot that is clean is given out again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from dynctl.protocol.kv_events import KvEvent, Removed, Stored, Tier

SlotKey = tuple[str, int]
"""(worker id, data-parallel rank)."""


@dataclass(slots=True)
class _Slot:
    """One bit, the key it stands for, and the hashes it is set for, by tier."""

    number: int
    bit: int
    key: SlotKey
    held: dict[Tier, set[int]] = field(default_factory=dict)


class Index:
    """The blocks of all workers. Repeated events change nothing."""

    def __init__(self) -> None:
        self._slots: dict[SlotKey, _Slot] = {}
        self._by_number: list[_Slot] = []
        self._free: list[int] = []
        self._retired: list[_Slot] = []
        self._live = 0
        self._masks: dict[Tier, dict[int, int]] = {"G1": {}}

    def apply(self, key: SlotKey, event: KvEvent) -> None:
        """Take over one event of `key`; a key not seen before starts empty."""
        if isinstance(event, Stored):
            self._store(key, event.tier, event.hashes)
        elif isinstance(event, Removed):
            self._remove(key, event.tier, event.hashes)
        else:
            self.reset(key)

    def _store(self, key: SlotKey, tier: Tier, hashes: Iterable[int]) -> None:
        slot = self._slots.get(key) or self._open(key)
        masks = self._masks.setdefault(tier, {})
        held = slot.held.setdefault(tier, set())
        bit, get = slot.bit, masks.get
        for h in hashes:
            mask = get(h)
            masks[h] = bit if mask is None else mask | bit
        held.update(hashes)

    def _remove(self, key: SlotKey, tier: Tier, hashes: Iterable[int]) -> None:
        slot = self._slots.get(key)
        held = slot.held.get(tier) if slot is not None else None
        if slot is None or not held:
            return
        masks, bit = self._masks[tier], slot.bit
        for h in hashes:
            if h in held:
                held.remove(h)
                _clear(masks, h, bit)

    def reset(self, key: SlotKey) -> None:
        """Forget what `key` holds, in all tiers. Takes the same time whatever it held."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._live &= ~slot.bit
            self._retired.append(slot)

    def remove_worker(self, worker: str) -> None:
        """Forget all ranks of `worker`."""
        for key in [key for key in self._slots if key[0] == worker]:
            self.reset(key)

    def match(
        self, hashes: Sequence[int], keys: Iterable[SlotKey] | None = None, tier: Tier = "G1"
    ) -> dict[SlotKey, int]:
        """How many blocks from the start of `hashes`, without a hole, each key holds in `tier`.

        Keys that hold not even the first block are left out. `keys` None = all.
        """
        alive = self._live if keys is None else self._bits(keys)
        depths: dict[SlotKey, int] = {}
        last: int | None = 0
        for depth, mask in enumerate(map(self._masks.get(tier, {}).get, hashes)):
            if mask == last and depth:
                continue
            last = mask
            still = alive & mask if mask is not None else 0
            if still != alive:
                if depth:
                    self._settle(depths, alive & ~still, depth)
                alive = still
                if not still:
                    break
        if hashes:
            self._settle(depths, alive, len(hashes))
        return depths

    def _settle(self, depths: dict[SlotKey, int], bits: int, depth: int) -> None:
        """Note `depth` for each slot of `bits`."""
        slots = self._by_number
        while bits:
            low = bits & -bits
            bits ^= low
            depths[slots[low.bit_length() - 1].key] = depth

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
        return slot


def _clear(masks: dict[int, int], h: int, bit: int) -> None:
    """Take `bit` out of the mask of `h`; a hash that nobody holds is dropped."""
    mask = masks[h] & ~bit
    if mask:
        masks[h] = mask
    else:
        del masks[h]
