"""One suite for the KV events of every engine: what they publish becomes dynctl's own hashes.

Each dialect says the same things in its engine's words; what the sidecar makes of them must be the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec
import pytest

from dynctl.engines import catalog
from dynctl.engines.base import KvReader
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.kv.translate import Translator
from dynctl.protocol.kv_events import Tier
from dynctl.transport.engine_events import EngineEventSource, EnginePublisher, EngineSubscriber

SIZE = 4
PROMPT = [*range(100, 100 + 3 * SIZE)]
GPU, HOST = "gpu", "host"
DEADLINE_S = 10.0
_VLLM_MEDIA = {GPU: "GPU", HOST: "CPU"}
_SGLANG_MEDIA = {GPU: "GPU", HOST: "CPU_PINNED"}
_TRTLLM_LEVELS = {GPU: 0, HOST: 1}


class Dialect(Protocol):
    """How one engine tells its events: a payload for each."""

    name: str
    backend: str
    zmq: bool

    def stored(
        self,
        names: Sequence[int],
        tokens: Sequence[int],
        parent: int | None = None,
        *,
        where: str = GPU,
        lora: str = "",
        salt: str = "",
        images: Sequence[str] = (),
    ) -> bytes:
        """Blocks `names` with `tokens`; `images`: what each block shows, "" = nothing."""
        ...

    def removed(self, names: Sequence[int], where: str = GPU) -> bytes: ...

    def cleared(self) -> bytes: ...


def _chunks(tokens: Sequence[int]) -> list[list[int]]:
    return [list(tokens[at : at + SIZE]) for at in range(0, len(tokens), SIZE)]


class VllmWords:
    """Maps, as 0.32 and 0.33 write them; hashes unsigned."""

    backend = "vllm"
    zmq = True

    def __init__(self, *, arrays: bool = False) -> None:
        self.name = "vllm-arrays" if arrays else "vllm"
        self._arrays = arrays

    def stored(
        self,
        names: Sequence[int],
        tokens: Sequence[int],
        parent: int | None = None,
        *,
        where: str = GPU,
        lora: str = "",
        salt: str = "",
        images: Sequence[str] = (),
    ) -> bytes:
        extra: list[list[Any]] = [[lora] if lora else [] for _ in names]
        for keys, image in zip(extra, images, strict=False):
            keys.extend([[image, 0]] if image else [])
        if salt and parent is None:
            extra[0].append(salt)
        event = {
            "type": "BlockStored",
            "block_hashes": list(names),
            "parent_block_hash": parent,
            "token_ids": list(tokens),
            "block_size": SIZE,
            "lora_id": 1 if lora else None,
            "medium": _VLLM_MEDIA[where],
            "lora_name": lora or None,
            "extra_keys": [keys or None for keys in extra],
        }
        return self._batch(event)

    def removed(self, names: Sequence[int], where: str = GPU) -> bytes:
        medium = _VLLM_MEDIA[where]
        return self._batch({"type": "BlockRemoved", "block_hashes": list(names), "medium": medium})

    def cleared(self) -> bytes:
        return self._batch({"type": "AllBlocksCleared"})

    def _batch(self, event: dict[str, Any]) -> bytes:
        return msgspec.msgpack.encode([1.5, [list(event.values()) if self._arrays else event], 0])


class SglangWords:
    """Signed hashes, a field for the salt, and images as token ids of their own."""

    name = backend = "sglang"
    zmq = True

    def stored(
        self,
        names: Sequence[int],
        tokens: Sequence[int],
        parent: int | None = None,
        *,
        where: str = GPU,
        lora: str = "",
        salt: str = "",
        images: Sequence[str] = (),
    ) -> bytes:
        padded = _chunks(tokens)
        for number, image in enumerate(images):
            padded[number] = [sum(image.encode()) + 1_000_000] * SIZE if image else padded[number]
        event: dict[str, Any] = {
            "type": "BlockStored",
            "block_hashes": [_signed(name) for name in names],
            "parent_block_hash": None if parent is None else _signed(parent),
            "token_ids": [token for block in padded for token in block],
            "block_size": SIZE,
            "lora_id": None,
            "medium": _SGLANG_MEDIA[where],
        }
        event |= {"cache_salt": salt} if salt else {}
        event |= {"lora_name": lora} if lora else {}
        return msgspec.msgpack.encode([1.5, [event], 0])

    def removed(self, names: Sequence[int], where: str = GPU) -> bytes:
        hashes = [_signed(name) for name in names]
        event = {"type": "BlockRemoved", "block_hashes": hashes, "medium": _SGLANG_MEDIA[where]}
        return msgspec.msgpack.encode([1.5, [event], 0])

    def cleared(self) -> bytes:
        return msgspec.msgpack.encode([1.5, [{"type": "AllBlocksCleared"}], 0])


class TrtllmWords:
    """JSON, as `/kv_cache_events` drains it. A gap in the numbers stands for an emptied cache."""

    name = backend = "trtllm"
    zmq = False

    def __init__(self) -> None:
        self._number = 0

    def stored(
        self,
        names: Sequence[int],
        tokens: Sequence[int],
        parent: int | None = None,
        *,
        where: str = GPU,
        lora: str = "",
        salt: str = "",
        images: Sequence[str] = (),
    ) -> bytes:
        shown = [*images, *[""] * (len(names) - len(images))]
        blocks = [
            {
                "type": "stored_block",
                "block_hash": name,
                "cache_level": _TRTLLM_LEVELS[where],
                "tokens": [
                    {"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in block
                ],
                "mm_keys": [{"type": "mm_key", "hash": image, "start_offset": 0}] if image else [],
            }
            for name, block, image in zip(names, _chunks(tokens), shown, strict=True)
        ]
        data: dict[str, Any] = {"type": "stored", "parent_hash": parent, "blocks": blocks}
        data |= {"lora_name": lora} if lora else {}
        data |= {"cache_salt": salt} if salt else {}
        return self._events(data)

    def removed(self, names: Sequence[int], where: str = GPU) -> bytes:
        """It tells a removal from the last tier only; one from the GPU is a move."""
        return self._events({"type": "removed", "block_hashes": list(names)})

    def moved_to_host(self, name: int) -> bytes:
        level = {"old_value": 0, "new_value": 1}
        return self._events({"type": "updated", "block_hash": name, "cache_level": level})

    def cleared(self) -> bytes:
        self._number += 5
        return self._events({"type": "created", "num_blocks_per_cache_level": [1, 1]})

    def _events(self, data: dict[str, Any]) -> bytes:
        self._number += 1
        event = {"event_id": self._number, "window_size": 4096, "data": data}
        return json.dumps([event]).encode()


def _signed(name: int) -> int:
    return name - (1 << 64) if name >= 1 << 63 else name


class Sidecar:
    """The reading half of a sidecar."""

    def __init__(self, dialect: Dialect) -> None:
        self._reader: KvReader = catalog.get(dialect.backend).kv_reader(SIZE)
        self._translator = Translator(0)
        self.batches = 0
        self.came = asyncio.Event()

    def take(self, number: int, payload: bytes) -> None:
        self.batches += 1
        self.came.set()
        for batch in self._reader.read(payload, time.time()):
            self._translator.feed(batch)

    def held(self, tier: Tier = "G1") -> list[int]:
        found = [stored.hashes for stored in self._translator.snapshot() if stored.tier == tier]
        return sorted(name for hashes in found for name in hashes)

    @property
    def skipped(self) -> int:
        counts = self._translator.skipped
        return counts.unknown_parent + counts.malformed + counts.partial


Tell = Callable[..., Any]


@asynccontextmanager
async def told(dialect: Dialect, folder: Path) -> AsyncIterator[tuple[Sidecar, Tell]]:
    """A sidecar, and how its engine tells it something: by a publisher on a unix socket, or when asked."""
    sidecar = Sidecar(dialect)
    if not dialect.zmq:

        async def answer(payload: bytes) -> None:
            sidecar.take(0, payload)

        yield sidecar, answer
        return
    source = EngineEventSource(f"ipc://{folder}/kv", f"ipc://{folder}/replay", "kv-events")
    publisher = EnginePublisher(source)
    publisher.start()
    subscriber = EngineSubscriber(source, sidecar.take, lambda _: None)
    subscriber.start()

    async def publish(payload: bytes) -> None:
        sent = publisher.publish(payload)
        async with asyncio.timeout(DEADLINE_S):
            while sidecar.batches <= sent:
                sidecar.came.clear()
                await sidecar.came.wait()

    try:
        yield sidecar, publish
    finally:
        subscriber.close()
        publisher.close()


def dialects() -> list[Dialect]:
    return [VllmWords(), VllmWords(arrays=True), SglangWords(), TrtllmWords()]


every_dialect = pytest.mark.parametrize("dialect", dialects(), ids=lambda dialect: dialect.name)
NAMES = [(1 << 63) + 11, 12, 13]


@every_dialect
@pytest.mark.parametrize(("lora", "salt"), [("", ""), ("ad", ""), ("", "s"), ("ad", "s")])
async def test_blocks_are_known_by_the_hashes_a_frontend_computes(
    dialect: Dialect, lora: str, salt: str, tmp_path: Path
) -> None:
    async with told(dialect, tmp_path) as (sidecar, tell):
        await tell(dialect.stored(NAMES[:2], PROMPT[: 2 * SIZE], lora=lora, salt=salt))
        await tell(dialect.stored(NAMES[2:], PROMPT[2 * SIZE :], NAMES[1], lora=lora, salt=salt))
        assert sidecar.held() == sorted(sequence_hashes(PROMPT, SIZE, root_hash(lora, salt)))
        await tell(dialect.removed(NAMES[2:]))
        assert sidecar.held() == sorted(sequence_hashes(PROMPT[: 2 * SIZE], SIZE, root_hash(lora, salt)))
    assert sidecar.skipped == 0


@every_dialect
async def test_prompts_that_differ_in_an_image_share_what_is_before_it_alone(
    dialect: Dialect, tmp_path: Path
) -> None:
    held = []
    for number, image in enumerate(("cat", "dog", "cat")):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with told(dialect, folder) as (sidecar, tell):
            await tell(dialect.stored(NAMES[:2], PROMPT[: 2 * SIZE], images=["", image]))
            await tell(dialect.stored(NAMES[2:], PROMPT[2 * SIZE :], NAMES[1]))
            held.append(set(sidecar.held()))
        assert sidecar.skipped == 0
    assert [len(found) for found in held] == [3, 3, 3]
    assert held[0] == held[2]
    assert held[0] & held[1] == set(sequence_hashes(PROMPT[:SIZE], SIZE, root_hash()))


@every_dialect
async def test_a_host_copy_outlives_the_one_on_the_gpu(dialect: Dialect, tmp_path: Path) -> None:
    expected = sequence_hashes(PROMPT[:SIZE], SIZE, root_hash())
    async with told(dialect, tmp_path) as (sidecar, tell):
        await tell(dialect.stored(NAMES[:1], PROMPT[:SIZE]))
        if isinstance(dialect, TrtllmWords):
            await tell(dialect.moved_to_host(NAMES[0]))
        else:
            await tell(dialect.stored(NAMES[:1], PROMPT[:SIZE], where=HOST))
            await tell(dialect.removed(NAMES[:1]))
        assert (sidecar.held("G1"), sidecar.held("G2")) == ([], expected)
        await tell(dialect.removed(NAMES[:1], HOST))
        assert sidecar.held("G2") == []


@every_dialect
async def test_an_emptied_cache_holds_nothing_in_any_tier(dialect: Dialect, tmp_path: Path) -> None:
    async with told(dialect, tmp_path) as (sidecar, tell):
        await tell(dialect.stored(NAMES, PROMPT))
        await tell(dialect.stored(NAMES[:1], PROMPT[:SIZE], where=HOST))
        await tell(dialect.cleared())
        assert sidecar.held("G1") == sidecar.held("G2") == []
