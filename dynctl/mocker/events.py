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
        extra = (
            [[event.salt], *[None] * (len(event.hashes) - 1)] if event.salt else [None] * len(event.hashes)
        )
        return {
            "type": "BlockStored",
            "block_hashes": [event_hash(digest) for digest in event.hashes],
            "parent_block_hash": None if event.parent is None else event_hash(event.parent),
            "token_ids": event.tokens,
            "block_size": block_size,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": extra,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    if isinstance(event, BlocksRemoved):
        hashes = [event_hash(digest) for digest in event.hashes]
        return {"type": "BlockRemoved", "block_hashes": hashes, "medium": "GPU", "group_idx": 0}
    return {"type": "AllBlocksCleared"}
