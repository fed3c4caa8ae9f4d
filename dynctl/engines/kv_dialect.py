"""The KV event dialect that vLLM and SGLang share, read into dynctl's terms. Pure.

A payload is msgpack `[timestamp, [event, ...], data_parallel_rank]`. An event is a map with a "type" key
(current releases) or a positional array whose first item is the type (older ones).
Contract: vllm/distributed/kv_events.py, sglang disaggregation/kv_events.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from dynctl.errors import CodecError
from dynctl.kv.hashing import extra_bytes
from dynctl.protocol.kv_events import (
    EngineCleared,
    EngineHash,
    EngineKvBatch,
    EngineKvEvent,
    EngineRemoved,
    EngineStored,
    Tier,
)

_U64 = (1 << 64) - 1
_TIERS: Mapping[str | None, Tier] = {
    None: "G1",
    "GPU": "G1",
    "CPU": "G2",
    "CPU_PINNED": "G2",
    "DISK": "G3",
    "STORAGE": "G3",
    "EXTERNAL": "G4",
}
_WHOLE_PREFIX_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Cache groups that keep every token of a prefix; the others (sliding window, Mamba, ...) keep a part."""

_STORED_FIELDS = (
    "type",
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
)
_REMOVED_FIELDS = ("type", "block_hashes", "medium", "group_idx")
_ARRAY_FIELDS = {"BlockStored": _STORED_FIELDS, "BlockRemoved": _REMOVED_FIELDS}


class PayloadReader:
    """`decode` as a `KvReader`: each payload speaks for itself."""

    def read(self, payload: bytes, now_s: float) -> list[EngineKvBatch]:
        """One batch, with the publisher's own time. Raises CodecError."""
        return [decode(payload)]


def decode(payload: bytes) -> EngineKvBatch:
    """One payload as a batch. Event types and media that are not known are skipped, as are unknown keys.

    Also skipped: cache groups that do not hold whole prefixes, and stores whose token ids do not fit their
    blocks. Raises CodecError for bytes that are no batch.
    """
    try:
        raw = msgspec.msgpack.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CodecError(f"KV event payload is not msgpack: {error}") from error
    if not (isinstance(raw, list) and len(raw) >= 2 and isinstance(raw[1], list)):
        raise CodecError("KV event payload is not [timestamp, [event, ...], rank]")
    timestamp, rank = raw[0], raw[2] if len(raw) > 2 else None
    if not isinstance(timestamp, int | float) or not isinstance(rank, int | None):
        raise CodecError("KV event payload has no number as timestamp or rank")
    try:
        events = [event for item in raw[1] if (event := _event(item)) is not None]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CodecError(f"KV event is malformed: {error!r}") from error
    return EngineKvBatch(timestamp=float(timestamp), rank=rank or 0, events=events)


def _event(item: Any) -> EngineKvEvent | None:
    fields = _as_map(item)
    match fields["type"]:
        case "BlockStored":
            return _stored(fields)
        case "BlockRemoved":
            return _removed(fields)
        case "AllBlocksCleared":
            return EngineCleared()
        case _:
            return None


def _as_map(item: Any) -> Mapping[str, Any]:
    if isinstance(item, dict):
        return item
    if isinstance(item, list):
        return dict(zip(_ARRAY_FIELDS.get(item[0], ("type",)), item, strict=False))
    raise TypeError(f"an event is a map or an array, not {type(item).__name__}")


def _stored(fields: Mapping[str, Any]) -> EngineStored | None:
    tier = _tier(fields)
    kind = fields.get("kv_cache_spec_kind")
    if tier is None or (kind is not None and kind not in _WHOLE_PREFIX_KINDS):
        return None
    hashes = [_hash(value) for value in fields["block_hashes"]]
    size = int(fields["block_size"])
    tokens = _token_ids(fields["token_ids"])
    if not hashes or size <= 0 or len(tokens) != len(hashes) * size:
        return None
    parent = fields["parent_block_hash"]
    lora = _lora_name(fields)
    extras, shown, salt = _read_extra_keys(fields, len(hashes), lora, first_of_prompt=parent is None)
    return EngineStored(
        block_hashes=hashes,
        parent=None if parent is None else _hash(parent),
        token_ids=tokens,
        block_size=size,
        extras=extras,
        shown=shown,
        tier=tier,
        lora_name=lora,
        cache_salt=salt,
        group=fields.get("group_idx") or 0,
    )


def _removed(fields: Mapping[str, Any]) -> EngineRemoved | None:
    tier = _tier(fields)
    if tier is None:
        return None
    hashes = [_hash(value) for value in fields["block_hashes"]]
    return EngineRemoved(block_hashes=hashes, tier=tier, group=fields.get("group_idx") or 0)


def _tier(fields: Mapping[str, Any]) -> Tier | None:
    """By medium; what lies on another machine than the publisher's is remote whatever it lies on."""
    tier = _TIERS.get(fields.get("medium"))
    return "G4" if tier is not None and fields.get("locality") == "REMOTE" else tier


def _hash(value: Any) -> EngineHash:
    """SGLang's hashes are signed, vLLM's unsigned: both as unsigned 64 bit. Long hashes stay bytes."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, int):
        return value & _U64
    raise TypeError(f"a block hash is an integer or bytes, not {type(value).__name__}")


def _token_ids(values: Sequence[Any]) -> list[int]:
    """Token ids; of SGLang's EAGLE pairs `[token, next token]` the first."""
    if values and isinstance(values[0], list):
        return [int(pair[0]) for pair in values]
    return list(values)


def _lora_name(fields: Mapping[str, Any]) -> str:
    """The adapter's name. Releases that give only the worker's local number get a name no request has."""
    if name := fields.get("lora_name"):
        return str(name)
    number = fields.get("lora_id")
    return "" if number is None else f"\0lora-{number}"


def _read_extra_keys(
    fields: Mapping[str, Any], blocks: int, lora: str, *, first_of_prompt: bool
) -> tuple[list[bytes], list[list[tuple[str, int]]], str]:
    """What each block depends on beside tokens, adapter and salt ([] = nothing), what media it shows ([] =
    none), and the salt.

    vLLM lists a block's further keys untagged: adapter name, (media id, offset) pairs, the salt (text; first
    block of a prompt only), digests of embeds (bytes). SGLang has a `cache_salt` field instead, and puts the
    identity of images into the token ids.
    """
    salt = str(fields.get("cache_salt") or "")
    extras: list[bytes] = []
    shown: list[list[tuple[str, int]]] = []
    for number, keys in enumerate((fields.get("extra_keys") or ())[:blocks]):
        rest = list(keys or ())
        if lora and rest and rest[0] == lora:
            rest.pop(0)
        if number == 0 and first_of_prompt:
            at = next((at for at, key in enumerate(rest) if isinstance(key, str)), None)
            salt = salt if at is None else rest.pop(at)
        extras.append(extra_bytes(rest) if rest else b"")
        shown.append([(key[0], key[1]) for key in rest if _is_media(key)])
    if not any(extras):
        return [], [], salt
    missing = blocks - len(extras)
    shown += [[] for _ in range(missing)]
    return extras + [b""] * missing, shown if any(shown) else [], salt


def _is_media(key: Any) -> bool:
    return isinstance(key, list) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int)
