"""TensorRT-LLM's KV events, as `POST /kv_cache_events` drains them, in dynctl's terms.

Contract: tensorrt_llm/serve/openai_server.py, tensorrt_llm/_utils.py (KVCacheEventSerializer). There is no
publisher to subscribe to: one reader polls, and a gap in `event_id` means that events were dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import msgspec

from dynctl.engines.base import Json
from dynctl.errors import CodecError
from dynctl.protocol.kv_events import (
    EngineCleared,
    EngineKvBatch,
    EngineKvEvent,
    EngineRemoved,
    EngineStored,
    Tier,
)

logger = logging.getLogger(__name__)

_LEVELS: dict[int, Tier] = {0: "G1", 1: "G2"}
_U64 = (1 << 64) - 1


_MALFORMED = (
    msgspec.DecodeError,
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RecursionError,
)


class PollReader:
    """Keeps what one worker's answers mean together: window size, numbers seen, partial blocks, sizes.

    `tokens_per_block` is the engine's block size; blocks with fewer tokens are not shown, nor their removal.
    Of models with several attention windows only the largest window counts: it holds whole prefixes.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self._block_size = tokens_per_block
        self._window = 0
        self._next: dict[int, int] = {}
        self._hidden: dict[int, set[int]] = {}
        self._held: dict[int, dict[int, tuple[EngineStored, Tier]]] = {}

    def read(self, payload: bytes, now_s: float) -> list[EngineKvBatch]:
        """The events of one answer, a batch per attention rank. Raises CodecError when it is none.

        A gap in a rank's numbers, or a larger window appearing, empties that rank's index first.
        """
        try:
            raw = msgspec.json.decode(payload)
            by_rank: dict[int, list[EngineKvEvent]] = {}
            for item in raw:
                rank = int(item.get("attention_dp_rank") or 0)
                by_rank.setdefault(rank, []).extend(self._event(rank, item))
        except _MALFORMED as error:
            raise CodecError(f"KV events of the engine are malformed: {error!r}") from error
        return [
            EngineKvBatch(timestamp=now_s, rank=rank, events=events)
            for rank, events in sorted(by_rank.items())
            if events
        ]

    def _event(self, rank: int, item: Json) -> Iterator[EngineKvEvent]:
        number, window = int(item["event_id"]), int(item.get("window_size") or 0)
        expected = self._next.get(rank, number)
        if number != expected:
            logger.warning("kv_events.gap rank=%d expected=%d got=%d", rank, expected, number)
        if number != expected or window > self._window > 0:
            self._forget(rank)
            yield EngineCleared()
        self._next[rank] = number + 1
        self._window = max(self._window, window)
        if window < self._window:
            return
        data = item["data"]
        match data["type"]:
            case "stored":
                yield from self._stored(rank, data)
            case "removed":
                yield from self._removed(rank, [int(value) & _U64 for value in data["block_hashes"]])
            case "updated":
                yield from self._moved(rank, data)
            case _:
                return

    def _forget(self, rank: int) -> None:
        self._hidden.pop(rank, None)
        self._held.pop(rank, None)

    def _stored(self, rank: int, data: Json) -> Iterator[EngineStored]:
        """One event per block: neighbours may lie in different tiers."""
        hidden, held = self._hidden.setdefault(rank, set()), self._held.setdefault(rank, {})
        raw_parent = data.get("parent_hash")
        parent = None if raw_parent is None else int(raw_parent) & _U64
        for block in data["blocks"]:
            name = int(block["block_hash"]) & _U64
            tokens = [_token(token) for token in block["tokens"]]
            tier = _LEVELS.get(int(block.get("cache_level") or 0))
            if len(tokens) != self._block_size or tier is None or parent in hidden:
                hidden.add(name)
            else:
                event = EngineStored(
                    block_hashes=[name],
                    parent=parent,
                    token_ids=tokens,
                    block_size=self._block_size,
                    tier=tier,
                    extras=_extras(block),
                    lora_name=str(data.get("lora_name") or block.get("lora_name") or ""),
                    cache_salt=str(data.get("cache_salt") or block.get("cache_salt") or ""),
                )
                hidden.discard(name)
                held[name] = (event, tier)
                yield event
            parent = name

    def _removed(self, rank: int, names: list[int]) -> Iterator[EngineRemoved]:
        hidden, held = self._hidden.setdefault(rank, set()), self._held.setdefault(rank, {})
        for name in names:
            if name in hidden:
                hidden.discard(name)
            elif name in held:
                yield EngineRemoved(block_hashes=[name], tier=held.pop(name)[1])

    def _moved(self, rank: int, data: Json) -> Iterator[EngineKvEvent]:
        """A block that went from one tier to another; a change of priority alone says nothing."""
        change: Any = data.get("cache_level")
        found = self._held.get(rank, {}).get(int(data["block_hash"]) & _U64)
        if not change or found is None:
            return
        stored, old = found
        new = _LEVELS.get(int(change["new_value"]))
        if new is None or new == old:
            return
        name = int(data["block_hash"]) & _U64
        self._held[rank][name] = (stored, new)
        yield msgspec.structs.replace(stored, tier=new)
        yield EngineRemoved(block_hashes=[name], tier=old)


def _token(token: Any) -> int:
    return int(token["token_id"]) if isinstance(token, dict) else int(token)


def _extras(block: Json) -> list[bytes]:
    """What the block depends on beside its token ids: media by key, and ids that stand for embeddings."""
    ids = [token.get("token_extra_id") or 0 for token in block["tokens"] if isinstance(token, dict)]
    media = block.get("mm_keys")
    if not media and not any(ids):
        return []
    return [msgspec.json.encode([media or [], ids if any(ids) else []], order="sorted")]
