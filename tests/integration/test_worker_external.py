"""Engines that run elsewhere, and the event plane of a sidecar: events, replay, snapshots, load."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.errors import CodecError, UsageError
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.kv_events import Cleared, KvEvent, KvSyncReply, Stored
from dynctl.transport.engine_events import EngineEventSource, EnginePublisher
from tests.integration.worker_rig import ENGINE, Reader, Rig, until

BLOCK = 16


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    yield made
    await made.close()


@contextmanager
def running_engine(rig: Rig) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, str(ENGINE), "--port", str(rig.port)], stdout=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def tokens(prompt: int) -> list[int]:
    return list(range(prompt * 1000, prompt * 1000 + BLOCK))


def own_hash(prompt: int) -> int:
    return sequence_hashes(tokens(prompt), BLOCK, root_hash())[0]


def stored(prompt: int, time: float = 0) -> bytes:
    event: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": [prompt + 1],
        "parent_block_hash": None,
        "token_ids": tokens(prompt),
        "block_size": BLOCK,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return msgspec.msgpack.encode([time or float(prompt), [event], 0])


def events_of(reply: KvSyncReply) -> list[KvEvent]:
    """All events of the batches, in order."""
    return [event for batch in reply.batches for event in batch.events]


async def test_events_and_load_reach_a_reader_and_a_late_one_syncs(rig: Rig) -> None:
    publisher = EnginePublisher(EngineEventSource(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0"))
    live, replay = publisher.start()
    for prompt in range(3):
        publisher.publish(stored(prompt))
    rig.start(rig.spec(kv_endpoints=[live], kv_replay_endpoints=[replay]))
    reader = Reader(rig, await rig.ready())
    await until(lambda: bool(reader.loads))
    assert (reader.loads[0].worker, reader.loads[0].kv_usage) == ("decode-0", 0.25)

    await until(lambda: bool(reader.batches))  # the beat repeats the last one for those who came late
    publisher.publish(stored(3))
    await until(lambda: reader.batches[-1].events == [Stored([own_hash(3)])])

    reply = await reader.sync(0)
    assert (reply.snapshot, reply.resets, reply.block_size) == (None, 0, BLOCK)
    assert [batch.seq for batch in reply.batches] == list(range(reply.next_seq))
    assert events_of(reply) == [Stored([own_hash(p)]) for p in range(4)]
    assert (await reader.sync(reply.next_seq)).batches == []
    ahead = await reader.sync(99)
    assert ahead.snapshot is not None
    assert {h for part in ahead.snapshot for h in part.hashes} == {own_hash(p) for p in range(4)}
    assert (await reader.sync(0, rank=7)).next_seq == 0
    with pytest.raises(UsageError, match="unknown op"):
        await reader.call("kv.nonsense", None)
    with pytest.raises(CodecError):
        await reader.call("kv.sync", None)
    reader.close()
    publisher.close()


async def test_lost_engine_events_reset_the_index_visibly(rig: Rig) -> None:
    publisher = EnginePublisher(
        EngineEventSource(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0"),
        buffer_steps=2,
        drop=lambda seq: 2 <= seq < 8,
    )
    live, replay = publisher.start()
    publisher.publish(stored(0))
    publisher.publish(stored(1))
    rig.start(rig.spec(kv_endpoints=[live], kv_replay_endpoints=[replay]))
    reader = Reader(rig, await rig.ready())
    first = await reader.sync_until(0, lambda reply: len(events_of(reply)) == 2)
    for prompt in range(2, 10):
        publisher.publish(stored(prompt))
    wanted = [Stored([own_hash(8), own_hash(9)])]
    reply = await reader.sync_until(10**6, lambda reply: reply.resets > 0 and reply.snapshot == wanted)
    kept = await reader.sync(first.next_seq)
    assert events_of(kept)[0] == Cleared()
    assert reply.resets == 1
    assert "kv_index.reset" in rig.log()
    reader.close()
    publisher.close()


async def test_payload_that_cannot_be_read_resets(rig: Rig) -> None:
    publisher = EnginePublisher(EngineEventSource(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0"))
    live, replay = publisher.start()
    publisher.publish(stored(0))
    publisher.publish(b"\xc1")
    rig.start(rig.spec(kv_endpoints=[live], kv_replay_endpoints=[replay]))
    reader = Reader(rig, await rig.ready())
    reply = await reader.sync_until(10**6, lambda reply: reply.resets > 0)
    assert reply.snapshot == []
    reader.close()
    publisher.close()


async def test_external_engine_is_attached_left_and_attached_again(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=None))
    await until(lambda: "engine.not_ready" in rig.log())
    assert rig.member() is None
    with running_engine(rig):
        instance = await rig.ready()
        assert instance.engine_pid == 0
        assert instance.model is not None
        assert instance.model.block_size == BLOCK
    await until(lambda: rig.member() is None)
    with running_engine(rig):
        await rig.ready()
        process.terminate()
        assert await rig.exit_code(process) == 0
        assert rig.member() is None


async def test_external_engine_that_was_away_has_its_index_cleared(rig: Rig) -> None:
    publisher = EnginePublisher(EngineEventSource(endpoint="tcp://127.0.0.1:0", replay="tcp://127.0.0.1:0"))
    live, replay = publisher.start()
    publisher.publish(stored(0))
    rig.start(rig.spec(engine=None, kv_endpoints=[live], kv_replay_endpoints=[replay]))
    with running_engine(rig):
        reader = Reader(rig, await rig.ready())
        await reader.sync_until(0, lambda reply: reply.next_seq >= 1)
    await until(lambda: rig.member() is None)
    with running_engine(rig):
        await rig.ready()
        reply = await reader.sync_until(0, lambda reply: len(events_of(reply)) >= 3)
    assert events_of(reply)[1:] == [Cleared(), Stored([own_hash(0)])]
    assert reply.resets == 1
    reader.close()
    publisher.close()


async def test_superseded_sidecar_of_an_external_engine_leaves_the_engine_alone(rig: Rig) -> None:
    with running_engine(rig) as engine:
        process = rig.start(rig.spec(engine=None))
        await rig.ready()
        rig.registry.set_current("decode-0", 2)
        assert await rig.exit_code(process) == 3
        assert engine.poll() is None


async def test_sidecar_waiting_for_an_external_engine_ends_on_sigint(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=None))
    await until(lambda: "engine.not_ready" in rig.log())
    process.send_signal(signal.SIGINT)
    assert await rig.exit_code(process) == 0
