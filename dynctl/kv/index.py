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
from dataclasses import dataclass

from dynctl.kv.holders import holders
from dynctl.kv.walk import python_walk
from dynctl.native.load import Holders
from dynctl.protocol.kv_events import KvEvent, Removed, Stored, Tier

SlotKey = tuple[str, int]
"""(worker id, data-parallel rank)."""

DEFAULT_LIMIT = 8_000_000
EVICTED_AT_ONCE = 1024
_OWN_TIER: tuple[Tier, ...] = ("G1",)


@dataclass(slots=True)
class _Slot:
    """One bit, and the key it stands for."""

    number: int
    bit: int
    key: SlotKey


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
        self._alive = b""
        self._tiers: dict[Tier, Holders] = {"G1": holders()}
        self.evicted = 0
        self.generation = 0
        """Another number whenever a key has got, or lost, its slot."""

    def __len__(self) -> int:
        """Blocks remembered; one that several workers hold is one."""
        return sum(map(len, self._tiers.values()))

    def apply(self, key: SlotKey, event: KvEvent) -> None:
        """Take over one event of `key`; a key not seen before starts empty."""
        if isinstance(event, Stored):
            self._store(key, event.tier, event.hashes)
        elif isinstance(event, Removed):
            self._remove(key, event.tier, event.hashes)
        else:
            self.reset(key)

    def _store(self, key: SlotKey, tier: Tier, hashes: list[int]) -> None:
        slot = self._slots.get(key) or self._open(key)
        there = self._tiers.get(tier)
        if there is None:
            there = self._tiers[tier] = holders()
        there.add(slot.number, hashes)
        while len(self) > self._limit:
            largest = max(self._tiers.values(), key=len)
            self.evicted += largest.evict(min(EVICTED_AT_ONCE, max(1, self._limit // 8)))

    def touch(self, hashes: Sequence[int], first: int) -> None:
        """The `first` of these are in use: of the G1 blocks they are to go last. Does nothing while there is
        much room.
        """
        if len(self) * 8 > self._limit * 7:
            self._tiers["G1"].touch(list(hashes[:first]))

    def _remove(self, key: SlotKey, tier: Tier, hashes: list[int]) -> None:
        slot, there = self._slots.get(key), self._tiers.get(tier)
        if slot is not None and there is not None:
            there.discard(slot.number, hashes)

    def reset(self, key: SlotKey) -> None:
        """Forget what `key` holds, in all tiers. Takes the same time whatever it held."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._settle(self._live & ~slot.bit)
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
        alive = self._alive if keys is None else _as_bytes(self._bits(keys))
        slots = self._by_number
        return {slots[i].key: depth for i, depth in enumerate(self._walk(hashes, alive, tiers)) if depth}

    def depths(self, hashes: Sequence[int], tiers: Sequence[Tier] = _OWN_TIER) -> list[int]:
        """`match` for all keys, by the numbers that `places` gives. The last entry is 0."""
        return self._walk(hashes, self._alive, tiers)

    def places(self, keys: Iterable[SlotKey]) -> list[int]:
        """Where each of `keys` is in `depths`, while `generation` stays the same."""
        slots = self._slots
        return [slots[key].number if key in slots else -1 for key in keys]

    def _walk(self, hashes: Sequence[int], alive: bytes, tiers: Sequence[Tier]) -> list[int]:
        """Depths by slot number, of the slots in `alive`; one entry more is for whoever has no slot."""
        row = hashes if isinstance(hashes, list) else list(hashes)
        there = [held for tier in tiers if (held := self._tiers.get(tier)) is not None]
        if len(there) == 1:
            return there[0].walk(row, alive, len(self._by_number) + 1)
        found = [0] * (len(self._by_number) + 1)
        python_walk(_anywhere(there), row, int.from_bytes(alive, "little"), found)
        return found

    @property
    def tiered(self) -> bool:
        """Whether blocks are, or were, held in other tiers than G1."""
        return len(self._tiers) > 1

    def _bits(self, keys: Iterable[SlotKey]) -> int:
        bits = 0
        for key in keys:
            slot = self._slots.get(key)
            if slot is not None:
                bits |= slot.bit
        return bits

    def stats(self, tier: Tier = "G1") -> dict[SlotKey, int]:
        """Blocks held in `tier`, by key."""
        there = self._tiers.get(tier)
        counted = (lambda number: 0) if there is None else there.count
        return {key: counted(slot.number) for key, slot in self._slots.items()}

    @property
    def dirty(self) -> bool:
        """Whether `sweep` has still bits of forgotten keys to clear."""
        return bool(self._retired)

    def sweep(self, budget: int) -> bool:
        """Clear up to `budget` bits of forgotten keys. Returns whether some are left."""
        while self._retired and budget > 0:
            number = self._retired[-1].number
            for there in self._tiers.values():
                budget = there.clear(number, budget)
            if not any(there.count(number) for there in self._tiers.values()):
                self._retired.pop()
                heapq.heappush(self._free, number)
        return bool(self._retired)

    def _open(self, key: SlotKey) -> _Slot:
        """A clean slot for `key`, the lowest there is so that masks stay narrow."""
        number = heapq.heappop(self._free) if self._free else len(self._by_number)
        slot = self._slots[key] = _Slot(number, 1 << number, key)
        self._by_number[number : number + 1] = [slot]
        self._settle(self._live | slot.bit)
        return slot

    def _settle(self, live: int) -> None:
        self._live, self._alive = live, _as_bytes(live)
        self.generation += 1


def _as_bytes(mask: int) -> bytes:
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def _anywhere(tiers: Sequence[Holders]) -> Callable[[int], int]:
    """Who holds a hash in any of several tiers."""
    gets = [there.get for there in tiers]

    def anywhere(h: int) -> int:
        mask = 0
        for get in gets:
            mask |= get(h)
        return mask

    return anywhere
