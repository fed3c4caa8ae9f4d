"""KV events in two forms: as an engine tells them, and as they travel on dynctl's event plane.

An engine's block hashes are opaque (64 bits or 32 bytes) and mean something in that engine only. The worker
sidecar maps them to dynctl's own sequence hashes (see `kv.hashing`), so frontends need no engine's dialect.
"""

from __future__ import annotations

from typing import Literal

import msgspec

KV_TOPIC = b"kv"
LOAD_TOPIC = b"load"

Tier = Literal["G1", "G2", "G3", "G4"]
"""G1 GPU (or the engine's own fast memory), G2 host, G3 disk, G4 remote."""

EngineHash = int | bytes


class EngineStored(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks the engine now holds: consecutive; the first one's parent is `parent` (None = prompt start).

    `token_ids` holds len(block_hashes) * block_size ids. `group` is the KV cache group of a hybrid model.
    `extras`: per block what its hash depends on beside tokens, adapter and salt (images, embeddings), b"" =
    nothing; [] = nothing for all of them. `shown`: per block the media that its tokens stand for, by name,
    and where in the block each begins (below 0: before it); [] = none.
    """

    block_hashes: list[EngineHash]
    parent: EngineHash | None
    token_ids: list[int]
    block_size: int
    tier: Tier = "G1"
    lora_name: str = ""
    cache_salt: str = ""
    group: int = 0
    extras: list[bytes] = []
    shown: list[list[tuple[str, int]]] = []


class EngineRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks the engine no longer holds in `tier`, for cache group `group` only.

    Engines name the blocks of all groups by the same hashes but stores of groups other than full attention
    are never shown, so a removal counts only when its group is the one the block was stored with.
    """

    block_hashes: list[EngineHash]
    tier: Tier = "G1"
    group: int = 0


class EngineCleared(msgspec.Struct, frozen=True):
    """The engine holds nothing any more, in no tier."""


EngineKvEvent = EngineStored | EngineRemoved | EngineCleared


class EngineKvBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One message of an engine's publisher. `timestamp` is the engine's clock in seconds."""

    timestamp: float
    rank: int
    events: list[EngineKvEvent]


class Stored(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """Sequence hashes (unsigned 64 bit) now held in `tier`."""

    hashes: list[int]
    tier: Tier = "G1"


class Removed(msgspec.Struct, frozen=True, tag="r", array_like=True):
    """Sequence hashes no longer held in `tier`."""

    hashes: list[int]
    tier: Tier = "G1"


class Cleared(msgspec.Struct, frozen=True, tag="c", array_like=True):
    """Nothing is held any more, in no tier."""


KvEvent = Stored | Removed | Cleared

Runs = list[tuple[int, int]]
"""Tokens as (token, how often in a row)."""


class Shown(msgspec.Struct, frozen=True, array_like=True):
    """The tokens that stand for one image in prompts, by the name that KV events know it by."""

    name: str
    runs: Runs


class KvBatch(msgspec.Struct, frozen=True, array_like=True):
    """One numbered message on the event plane; `seq` rises by one per (worker, incarnation, rank), from 0.

    `shown`: images of which the engine has shown the tokens for the first time.
    """

    worker: str
    incarnation: int
    rank: int
    seq: int
    events: list[KvEvent]
    block_size: int = 0
    shown: list[Shown] = []


class KvSync(msgspec.Struct, frozen=True, kw_only=True):
    """Ask a worker (op "kv.sync") for all batches of `rank` from number `from_seq` on."""

    rank: int
    from_seq: int


class KvSyncReply(msgspec.Struct, frozen=True, kw_only=True):
    """Either the batches asked for or, if no longer kept, a whole `snapshot` as of `next_seq` - 1.

    With a snapshot the reader first forgets all it knew of (worker, rank); `shown` are then all images known.
    `resets` counts how often this
    worker itself lost engine events for good and had to start its index anew.
    """

    incarnation: int
    rank: int
    next_seq: int
    batches: list[KvBatch] = []
    snapshot: list[Stored] | None = None
    block_size: int = 0
    resets: int = 0
    shown: list[Shown] = []


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """What an engine says of its own load, per rank, at about once a second and on change.

    `kv_usage` is 0..1 of its KV blocks; counters are totals since the engine's start.
    """

    worker: str
    incarnation: int
    rank: int
    running: int
    waiting: int
    kv_usage: float
    kv_blocks: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
