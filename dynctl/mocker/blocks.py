"""Paged KV blocks with prefix caching and LRU eviction, and what changed as events. Pure.

A block is free (nobody uses it) or used (`refs` > 0). A full block may be *cached* under its hash; a free
cached block keeps its content until it is evicted, the least recently freed first. One hash is cached in at
most one block, so replaying the events gives exactly the cached set.
"""

from __future__ import annotations

import hashlib
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


def _hash_object(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)).digest()


ROOT_HASH = _hash_object("vllm-none-hash")
"""The parent of a prompt's first block: vLLM's default seed string, the same in every process."""


MediaKey = tuple[str, int]
"""The name of an image that a block shows, and where it begins there (below 0: in a block before)."""


@dataclass(frozen=True, slots=True)
class Media:
    """An image in a prompt: its name, and which tokens are placeholders of it."""

    name: str
    start: int
    end: int


def media_keys(media: Sequence[Media], start: int, end: int) -> tuple[MediaKey, ...]:
    """The images of which the tokens start .. end - 1 show something."""
    return tuple((one.name, one.start - start) for one in media if one.start < end and one.end > start)


def block_hash(
    parent: bytes,
    tokens: tuple[int, ...],
    salt: str = "",
    adapter: str = "",
    media: Sequence[MediaKey] = (),
) -> bytes:
    """The 32-byte hash of a block as vLLM's `sha256` makes it: over parent hash, token ids and extra keys.

    `salt` (a request's `cache_salt`) is given for the first block of a prompt only, `adapter` for each.
    """
    extra: list[tuple[str, str] | tuple[str, str, int]] = [("lora", adapter)] if adapter else []
    extra += [("mm", name, offset) for name, offset in media]
    if salt:
        extra.append(("cache_salt", salt))
    return _hash_object((parent, tokens, tuple(extra) or None))


def event_hash(digest: bytes) -> int:
    """The unsigned 64-bit form of a block hash that events carry: its last 8 bytes, big-endian."""
    return int.from_bytes(digest[-8:], "big")


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """Consecutive blocks now cached; `parent` is the hash before the first, None at a prompt's start.

    `tokens` holds len(hashes) * block_size ids; `salt` is set where the first block carries one. `media`: by
    block, () = none in any.
    """

    hashes: list[bytes]
    parent: bytes | None
    tokens: list[int]
    salt: str = ""
    adapter: str = ""
    media: tuple[tuple[MediaKey, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """Blocks whose content is gone."""

    hashes: list[bytes]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """Nothing is cached any more."""


BlockEvent = BlocksStored | BlocksRemoved | BlocksCleared


@dataclass(slots=True)
class BlockPool:
    """`count` blocks of `block_size` tokens. Block ids are 0 .. count - 1.

    Every id handed out by `allocate` or taken by `acquire` must come back by `release` as often.
    """

    count: int
    block_size: int
    caching: bool = True
    events: list[BlockEvent] = field(default_factory=list)
    _refs: list[int] = field(init=False)
    _hash_of: list[bytes | None] = field(init=False)
    _cached: dict[bytes, int] = field(init=False, default_factory=dict)
    _free: OrderedDict[int, None] = field(init=False)

    def __post_init__(self) -> None:
        self._refs = [0] * self.count
        self._hash_of = [None] * self.count
        self._free = OrderedDict.fromkeys(range(self.count))

    @property
    def free(self) -> int:
        """Blocks that nobody uses, cached ones included."""
        return len(self._free)

    @property
    def usage(self) -> float:
        """The used part of all blocks, 0..1."""
        return 1.0 - len(self._free) / self.count

    def cached(self) -> frozenset[bytes]:
        """All hashes that are cached now."""
        return frozenset(self._cached)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached beginning of a chain. They are not taken: `acquire` them."""
        found: list[int] = []
        for digest in hashes:
            block = self._cached.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle(self, blocks: Iterable[int]) -> int:
        """How many of the blocks are free now, so that taking them makes fewer left to allocate."""
        return sum(1 for block in blocks if not self._refs[block])

    def acquire(self, blocks: Iterable[int]) -> None:
        """Use cached blocks once more; they cannot be evicted until released."""
        for block in blocks:
            if not self._refs[block]:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` empty blocks, evicting the oldest cached ones; None (nothing done) if too few are free."""
        if count > len(self._free):
            return None
        taken: list[int] = []
        evicted: list[bytes] = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            digest = self._hash_of[block]
            if digest is not None:
                del self._cached[digest]
                self._hash_of[block] = None
                evicted.append(digest)
            self._refs[block] = 1
            taken.append(block)
        self.events.extend(BlocksRemoved([digest]) for digest in evicted)
        return taken

    def commit(self, blocks: Sequence[int], chain: BlocksStored) -> None:
        """Cache the full `blocks` that hold `chain`: block i has hash i and its share of the tokens.

        A block whose hash another block already holds stays private: it is used but never found by `match`.
        """
        if not self.caching:
            return
        hashes = chain.hashes
        run_start = 0
        for i, (block, digest) in enumerate(zip(blocks, hashes, strict=True)):
            if digest in self._cached:
                self._tell_stored(chain, run_start, i)
                run_start = i + 1
            else:
                self._cached[digest] = block
                self._hash_of[block] = digest
        self._tell_stored(chain, run_start, len(hashes))

    def _tell_stored(self, chain: BlocksStored, start: int, end: int) -> None:
        """An event for the blocks start .. end - 1 of a chain, if there are any."""
        if start == end:
            return
        size = self.block_size
        self.events.append(
            BlocksStored(
                hashes=chain.hashes[start:end],
                parent=chain.hashes[start - 1] if start else chain.parent,
                tokens=chain.tokens[start * size : end * size],
                salt="" if start else chain.salt,
                adapter=chain.adapter,
                media=chain.media[start:end],
            )
        )

    def release(self, blocks: Sequence[int]) -> None:
        """Give back a sequence's blocks, in prompt order: their tail is evicted before their head.

        Blocks without cached content are handed out again first.
        """
        for block in reversed(blocks):
            self._refs[block] -= 1
            if not self._refs[block]:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def reset(self) -> bool:
        """Forget all cached content; False (nothing done) while any block is used."""
        if len(self._free) != self.count:
            return False
        self._cached.clear()
        self._hash_of = [None] * self.count
        self.events.append(BlocksCleared())
        return True

    def take_events(self) -> list[BlockEvent]:
        """What changed since the last call, oldest first."""
        events, self.events = self.events, []
        return events
