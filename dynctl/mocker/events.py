"""KV events as vLLM publishes them: msgpack `[timestamp, [event, ...], rank]`, events as maps. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from dynctl.mocker.blocks import BlockEvent, BlocksRemoved, BlocksStored, event_hash

_encoder = msgspec.msgpack.Encoder()


def encode_batch(timestamp: float, events: Sequence[BlockEvent], rank: int, block_size: int) -> bytes:
    """One payload of the publisher. `timestamp` is Unix time in seconds."""
    return _encoder.encode([timestamp, [_map(event, block_size) for event in events], rank])


def _map(event: BlockEvent, block_size: int) -> dict[str, Any]:
    if isinstance(event, BlocksStored):
        adapter = [event.adapter] if event.adapter else []
        media = event.media or ((),) * len(event.hashes)
        extra: list[list[object]] = [[*adapter, *keys] for keys in media]
        if event.salt:
            extra[0].append(event.salt)
        return {
            "type": "BlockStored",
            "block_hashes": [event_hash(digest) for digest in event.hashes],
            "parent_block_hash": None if event.parent is None else event_hash(event.parent),
            "token_ids": event.tokens,
            "block_size": block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": event.adapter or None,
            "extra_keys": [keys or None for keys in extra],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    if isinstance(event, BlocksRemoved):
        hashes = [event_hash(digest) for digest in event.hashes]
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0}
    return {"type": "AllBlocksCleared"}
