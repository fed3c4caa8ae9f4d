"""A sidecar that fetches KV events from an engine which keeps them until asked, as TensorRT-LLM does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.http.exchange import Exchange
from dynctl.http.limits import Limits
from dynctl.http.request import Request
from dynctl.http.server import Server, serve
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.kv_events import Cleared, Removed, Stored
from dynctl.protocol.specs import KvPollSpec
from tests.integration.worker_rig import Reader, Rig, until

BLOCK = 4
TIMEOUT_S = 0.5


def tokens(prompt: int) -> list[int]:
    return list(range(prompt * 100, prompt * 100 + 2 * BLOCK))


def own(prompt: int) -> list[int]:
    return sequence_hashes(tokens(prompt), BLOCK, root_hash())


def stored(prompt: int, *, tail: int = 0) -> dict[str, Any]:
    """Two blocks of a prompt, and one more of `tail` tokens that is not full."""
    ids = tokens(prompt) + [9] * tail
    parts = [ids[first : first + BLOCK] for first in range(0, len(ids), BLOCK)]
    blocks = [
        {
            "type": "stored_block",
            "block_hash": prompt * 10 + number,
            "cache_level": 0,
            "priority": 35,
            "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in part],
        }
        for number, part in enumerate(parts)
    ]
    return {"type": "stored", "parent_hash": None, "blocks": blocks}


def removed(*names: int) -> dict[str, Any]:
    return {"type": "removed", "block_hashes": list(names)}


class ScriptedEngine:
    """Its queue is emptied by whoever asks. `answer` names what happens to the next answers, one each."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.polls = 0
        self._queue: list[dict[str, Any]] = []
        self._next = 0
        self._server: Server | None = None

    async def start(self, port: int) -> None:
        self._server = await serve(self._handle, host="127.0.0.1", port=port, limits=Limits())

    async def close(self) -> None:
        assert self._server is not None
        await self._server.close()

    def tell(self, *data: dict[str, Any]) -> None:
        for item in data:
            event = {"event_id": self._next, "window_size": 4096, "attention_dp_rank": 0, "data": item}
            self._queue.append(event)
            self._next += 1

    async def polled(self, times: int = 1) -> None:
        """Until so many more polls have come."""
        wanted = self.polls + times
        await until(lambda: self.polls >= wanted)

    async def _handle(self, request: Request, exchange: Exchange) -> None:
        if (request.method, request.path) == ("POST", "/kv_cache_events"):
            await self._drain(exchange)
        elif request.path == "/v1/models":
            exchange.respond(200, b'{"data": [{"id": "some/path"}]}')
        else:
            exchange.respond(200, b"[]")

    async def _drain(self, exchange: Exchange) -> None:
        self.polls += 1
        how = self.answers.pop(0) if self.answers else "whole"
        if how == "busy":
            exchange.respond(503, b"")
            return
        drained, self._queue = self._queue, []
        body = json.dumps(drained).encode()
        if how == "cut":
            exchange.start(200, [(b"content-length", b"%d" % (len(body) + 1))], framing="raw")
            exchange.write(body)
            exchange.abort()
        elif how == "none":
            exchange.abort()
        elif how == "late":
            await asyncio.sleep(TIMEOUT_S * 2)
            exchange.respond(200, body)
        elif how == "broken":
            exchange.respond(200, body[:-1])
        else:
            exchange.respond(200, body)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def engine(rig: Rig) -> AsyncIterator[ScriptedEngine]:
    made = ScriptedEngine()
    await made.start(rig.port)
    yield made
    await made.close()


@pytest.fixture
async def reader(rig: Rig, engine: ScriptedEngine) -> AsyncIterator[Reader]:
    """A frontend's end; the sidecar has known of the engine's first prompt for a while."""
    engine.tell({"type": "created", "num_blocks_per_cache_level": [100, 0]}, stored(1, tail=2))
    poll = KvPollSpec(
        path="/kv_cache_events", method="POST", interval_s=0.02, timeout_s=TIMEOUT_S, block_size=BLOCK
    )
    rig.start(rig.spec(backend="trtllm", engine=None, kv_poll=poll))
    made = Reader(rig, await rig.ready())
    reply = await made.sync_until(0, lambda reply: reply.next_seq == 1)
    assert [batch.events for batch in reply.batches] == [[Stored(own(1))]]
    assert reply.block_size == BLOCK
    await until(lambda: bool(made.batches))  # subscribed: the beat has repeated it
    yield made
    made.close()


async def test_polled_events_reach_a_reader_numbered(engine: ScriptedEngine, reader: Reader) -> None:
    engine.tell(stored(2))
    await until(lambda: reader.batches[-1].seq == 1)
    engine.tell(removed(12, 11, 20, 21))  # the first of them is the block that was not full
    await until(lambda: reader.batches[-1].seq == 2)
    assert [batch.events for batch in reader.batches[-2:]] == [
        [Stored(own(2))],
        [Removed([own(1)[1], *own(2)])],
    ]
    reply = await reader.sync(0)
    assert (reply.next_seq, reply.resets) == (3, 0)


@pytest.mark.parametrize("how", ["cut", "none", "late", "broken"])
async def test_events_drained_but_not_received_reset_the_index(
    rig: Rig, engine: ScriptedEngine, reader: Reader, how: str
) -> None:
    engine.answers.append(how)
    engine.tell(removed(10, 11), stored(2))
    lost = await reader.sync_until(10**6, lambda reply: reply.resets > 0)
    assert lost.snapshot == []
    await engine.polled(2)
    engine.tell(stored(3))
    reply = await reader.sync_until(1, lambda reply: reply.next_seq >= 3)
    assert [batch.events for batch in reply.batches] == [[Cleared()], [Stored(own(3))]]
    assert reply.resets == 1
    assert "kv_index.reset" in rig.log()


async def test_losses_in_a_row_are_told_once(rig: Rig, engine: ScriptedEngine, reader: Reader) -> None:
    engine.answers += ["none", "cut", "none"]
    await engine.polled(5)
    reply = await reader.sync(0)
    assert [batch.events for batch in reply.batches[1:]] == [[Cleared()]]
    assert rig.log().count("kv_poll.failed") == 1
    await until(lambda: "kv_poll.recovered failures=3" in rig.log())


async def test_busy_engine_keeps_its_events_until_it_answers(
    rig: Rig, engine: ScriptedEngine, reader: Reader
) -> None:
    engine.answers += ["busy"] * 3
    engine.tell(stored(2))
    reply = await reader.sync_until(1, lambda reply: reply.next_seq >= 2)
    assert [batch.events for batch in reply.batches] == [[Stored(own(2))]]
    assert reply.resets == 0
    assert rig.log().count("kv_poll.failed") == 1


async def test_events_that_another_reader_took_reset_the_index(
    rig: Rig, engine: ScriptedEngine, reader: Reader
) -> None:
    engine.tell()
    engine._next += 1
    engine.tell(stored(2))
    reply = await reader.sync_until(1, lambda reply: reply.next_seq >= 2)
    assert [batch.events for batch in reply.batches] == [[Cleared(), Stored(own(2))]]
    assert "kv_events.gap" in rig.log()
