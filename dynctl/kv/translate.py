"""From an engine's block hashes to dynctl's own: the engine's are opaque and differ per engine and version.

Each stored block is hashed anew from its token ids (see `kv.hashing`), its parent found by the engine's hash.
A parent that was never announced means that events were missed: the chain is skipped and counted, not
guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from dynctl.errors import RequestError
from dynctl.kv.hashing import extend, root_hash
from dynctl.kv.media import Sightings
from dynctl.protocol.kv_events import (
    Cleared,
    EngineHash,
    EngineKvBatch,
    EngineRemoved,
    EngineStored,
    KvEvent,
    Removed,
    Stored,
    Tier,
)

_U64 = (1 << 64) - 1


@dataclass(slots=True)
class Skipped:
    """Blocks that were announced but could not be taken over, since the translator was made.

    `unknown_parent`: events were missed before. `malformed`: token ids that do not fit the blocks, or are no
    token ids. `partial`: blocks of another size than the engine's own (the unfinished last page of a prompt,
    chunks of an offload tier), which no prompt can be matched with.
    """

    unknown_parent: int = 0
    malformed: int = 0
    partial: int = 0


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What a `Translator` knows of an engine, for another to go on with. `repeats`: (tier, name, count)."""

    block_size: int
    own: dict[EngineHash, int]
    groups: dict[Tier, dict[EngineHash, int]]
    repeats: list[tuple[Tier, EngineHash, int]]
    partial: list[EngineHash]


class Translator:
    """What one data-parallel rank of one engine holds, under both hashes.

    `block_size` in tokens is learnt: the largest block announced in G1 (0 before the first). Repeats are
    harmless in G1. The offload tiers G2..G4 announce a block once per copy, so there each removal takes back
    one (the engines' own rule). Only the cache group that a block was stored with can remove it.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.block_size = 0
        self.skipped = Skipped()
        self.images = Sightings()
        self._own: dict[EngineHash, int] = {}
        self._groups: dict[Tier, dict[EngineHash, int]] = {}
        self._repeats: Counter[tuple[Tier, EngineHash]] = Counter()
        self._holders: dict[Tier, Counter[int]] = {}
        self._partial: set[EngineHash] = set()

    def feed(self, batch: EngineKvBatch) -> list[KvEvent]:
        """The changes that `batch` makes, in its order; [] when it changes nothing.

        The caller sees to it that `batch.rank` is this translator's.
        """
        out: list[KvEvent] = []
        for event in batch.events:
            if isinstance(event, EngineStored):
                self._stored(event, out)
            elif isinstance(event, EngineRemoved):
                _emit(out, self._removed(event), event.tier, stored=False)
            else:
                self.reset()
                out.append(Cleared())
        return out

    def memory(self) -> Memory:
        """All that `recall` needs; how images look is learnt anew."""
        return Memory(
            block_size=self.block_size,
            own=dict(self._own),
            groups={tier: dict(groups) for tier, groups in self._groups.items()},
            repeats=[(*key, count) for key, count in self._repeats.items()],
            partial=list(self._partial),
        )

    def recall(self, memory: Memory) -> None:
        """Go on from there; nothing has been fed yet."""
        self.block_size, self._own = memory.block_size, dict(memory.own)
        self._groups = {tier: dict(groups) for tier, groups in memory.groups.items()}
        self._repeats.update({(tier, name): count for tier, name, count in memory.repeats})
        self._partial.update(memory.partial)
        for tier, groups in self._groups.items():
            self._holders[tier] = Counter(self._own[name] for name in groups)

    def snapshot(self) -> list[Stored]:
        """All that is held, by tier: what a reader that knows nothing needs."""
        return [Stored(list(holders), tier) for tier, holders in self._holders.items() if holders]

    def reset(self) -> None:
        """Forget all that is held. Counters, the block size and what images look like stay."""
        self._own.clear()
        self._groups.clear()
        self._repeats.clear()
        self._holders.clear()
        self._partial.clear()

    def _stored(self, event: EngineStored, out: list[KvEvent]) -> None:
        names = [_normal(h) for h in event.block_hashes]
        parent = None if event.parent is None else _normal(event.parent)
        if self._fits(event, names, parent, out):
            hashes = self._hashes(event, parent)
            held = zip(names, hashes, strict=True) if hashes is not None else ()
            new = [own for name, own in held if self._hold(name, own, event, out)]
            _emit(out, new, event.tier, stored=True)
            if hashes is not None:
                self.images.feed(event)

    def _fits(
        self, event: EngineStored, names: list[EngineHash], parent: EngineHash | None, out: list[KvEvent]
    ) -> bool:
        """Whether the blocks have the engine's block size, which is learnt here, and follow one that has."""
        if event.tier == "G1" and event.block_size > self.block_size:
            if self._own:
                self.reset()
                out.append(Cleared())
            self.block_size = event.block_size
        after_partial = parent in self._partial and parent not in self._own
        if event.block_size == self.block_size and not after_partial:
            return True
        self.skipped.partial += len(names)
        if event.block_size < self.block_size or after_partial:
            self._partial.update(names)
        return False

    def _hashes(self, event: EngineStored, parent: EngineHash | None) -> list[int] | None:
        """dynctl's hashes of the blocks of `event`; None (and counted) when they cannot be known."""
        count = len(event.block_hashes)
        extras = len(event.extras) in (0, count)
        if event.block_size < 1 or len(event.token_ids) != count * event.block_size or not extras:
            self.skipped.malformed += count
            return None
        before = root_hash(event.lora_name, event.cache_salt) if parent is None else self._own.get(parent)
        if before is None:
            self.skipped.unknown_parent += count
            return None
        try:
            return extend(before, event.token_ids, event.block_size, event.extras)
        except RequestError:
            self.skipped.malformed += count
            return None

    def _hold(self, name: EngineHash, own: int, event: EngineStored, out: list[KvEvent]) -> bool:
        """Note that `name` is in the tier of `event`. Returns whether `own` is new there."""
        if self._own.setdefault(name, own) != own:
            self._forget(name, out)
            self._own[name] = own
        groups = self._groups.setdefault(event.tier, {})
        if name in groups:
            if event.tier != "G1" and groups[name] == event.group:
                self._repeats[event.tier, name] += 1
            return False
        groups[name] = event.group
        holders = self._holders.setdefault(event.tier, Counter())
        holders[own] += 1
        return holders[own] == 1

    def _removed(self, event: EngineRemoved) -> Iterator[int]:
        """Take the blocks of `event` out of its tier; yields the hashes nobody there holds any more."""
        groups = self._groups.get(event.tier, {})
        for raw in event.block_hashes:
            name = _normal(raw)
            self._partial.discard(name)
            if name not in groups or groups[name] != event.group:
                continue
            if self._repeats.get((event.tier, name)):
                self._repeats[event.tier, name] -= 1
                continue
            own = self._own[name]
            if self._drop(name, event.tier):
                yield own

    def _drop(self, name: EngineHash, tier: Tier) -> bool:
        """End that `name` is in `tier`. Returns whether its own hash is gone from there."""
        own = self._own[name]
        del self._groups[tier][name]
        self._repeats.pop((tier, name), None)
        if not any(name in groups for groups in self._groups.values()):
            del self._own[name]
        holders = self._holders[tier]
        holders[own] -= 1
        if holders[own]:
            return False
        del holders[own]
        return True

    def _forget(self, name: EngineHash, out: list[KvEvent]) -> None:
        """The engine gave `name` to other tokens: what it stood for is gone, in all tiers."""
        own = self._own[name]
        for tier in [tier for tier, groups in self._groups.items() if name in groups]:
            if self._drop(name, tier):
                _emit(out, [own], tier, stored=False)


def _normal(name: EngineHash) -> EngineHash:
    """Engines write the same 64 bits signed or unsigned; bytes stay as they are."""
    return name & _U64 if isinstance(name, int) else name


def _emit(out: list[KvEvent], hashes: Iterable[int], tier: Tier, *, stored: bool) -> None:
    """Append one event, or lengthen the last one when it is of the same kind and tier."""
    fresh = list(hashes)
    if not fresh:
        return
    kind = Stored if stored else Removed
    last = out[-1] if out else None
    if isinstance(last, kind) and last.tier == tier:
        last.hashes.extend(fresh)
    else:
        out.append(kind(fresh, tier))
