"""Fault switches, KV events on the wire, and ends of the process."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import Any

import pytest

from dynctl.engines import kv_dialect
from dynctl.errors import DeadlineExceeded, PeerLost
from dynctl.protocol.kv_events import EngineCleared, EngineRemoved, EngineStored
from dynctl.transport.engine_events import EngineEventSource, EngineSubscriber
from tests.integration.mocker_process import DEADLINE_S, MockerProcess, mocker, sse

COMPLETIONS = "/v1/completions"
EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://127.0.0.1:0",
        "replay_endpoint": "tcp://127.0.0.1:0",
        "topic": "kv-events",
    }
)


def prompt(number: int, length: int = 64) -> dict[str, Any]:
    return {"prompt": [(number * 7 + i) % 1500 + 10 for i in range(length)], "max_tokens": 20}


class Mirror:
    """What a subscriber knows of one rank's cache."""

    def __init__(self, source: dict[str, Any]) -> None:
        self.hashes: set[int] = set()
        self.resets: list[str] = []
        self.subscriber = EngineSubscriber(
            EngineEventSource(source["endpoint"], source["replay_endpoint"], source["topic"], check_s=0.2),
            self.take,
            self.resets.append,
        )
        self.subscriber.start()

    def take(self, _seq: int, payload: bytes) -> None:
        for event in kv_dialect.decode(payload).events:
            if isinstance(event, EngineStored):
                self.hashes |= {value for value in event.block_hashes if isinstance(value, int)}
            elif isinstance(event, EngineRemoved):
                self.hashes -= set(event.block_hashes)
            elif isinstance(event, EngineCleared):
                self.hashes.clear()

    async def equals(self, found: MockerProcess, rank: int = 0) -> None:
        """Wait until it is what the engine holds."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                cached = (await found.get("/mock/state"))["ranks"][rank]["cached"]
                if cached and set(cached) == self.hashes:
                    return
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("loss", ["0", "0.5"])
async def test_events_tell_exactly_what_is_cached_even_when_half_are_lost(loss: str) -> None:
    flags = ("--speedup", "0", "--num-gpu-blocks-override", "64", "--max-model-len", "512")
    async with mocker(*flags, "--kv-events-config", EVENTS, "--fault-event-loss", loss) as found:
        mirror = Mirror((await found.get("/kv_event_sources"))["0"])
        for number in range(40):
            await found.post(COMPLETIONS, prompt(number))
        await mirror.equals(found)
        assert (await found.metric("dynctl_mocker_lost_event_batches_total") > 0) == (loss != "0")
        assert mirror.resets[1:] == []
        mirror.subscriber.close()


async def test_a_reset_cache_is_told_with_the_next_batch() -> None:
    async with mocker("--speedup", "0", "--kv-events-config", EVENTS) as found:
        mirror = Mirror((await found.get("/kv_event_sources"))["0"])
        await found.post(COMPLETIONS, prompt(1))
        await mirror.equals(found)
        assert (await found.call("POST", "/reset_prefix_cache")).status == 200
        await found.post(COMPLETIONS, prompt(2))
        await mirror.equals(found)
        mirror.subscriber.close()


async def test_each_rank_publishes_its_own_events() -> None:
    flags = ("--speedup", "0", "--data-parallel-size", "2", "--kv-events-config", EVENTS)
    async with mocker(*flags) as found:
        sources = await found.get("/kv_event_sources")
        mirrors = [Mirror(sources[str(rank)]) for rank in range(2)]
        for rank in range(2):
            await found.post(COMPLETIONS, prompt(rank), x_data_parallel_rank=str(rank))
        for rank, mirror in enumerate(mirrors):
            await mirror.equals(found, rank)
            mirror.subscriber.close()
        assert not mirrors[0].hashes & mirrors[1].hashes


async def test_a_crash_after_so_many_tokens_cuts_the_stream() -> None:
    async with mocker("--speedup", "0", "--fault-crash-after-tokens", "50") as found:
        stream = await found.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 8000})
        with pytest.raises(PeerLost):
            await stream.read(1 << 24)
        assert await found.exit_code() == 1
        assert "RuntimeError" in found.log[-1]


async def test_a_hanging_engine_is_healthy_and_answers_nothing() -> None:
    async with mocker("--speedup", "0") as found:
        await found.call("POST", "/mock/faults", {"hang": True})
        assert (await found.call("GET", "/health")).status == 200
        with pytest.raises(DeadlineExceeded):
            await found.client.request(
                found.origin, "POST", COMPLETIONS, body=json.dumps(prompt(1)).encode(), timeout_s=0.2
            )
        await found.call("POST", "/mock/faults", {"hang": False})
        assert (await found.post(COMPLETIONS, prompt(1)))["usage"]["completion_tokens"] == 20


async def test_a_hang_stops_streams_under_way_until_it_ends() -> None:
    async with mocker("--speedup", "1") as found:
        stream = await found.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 30})
        reading = asyncio.create_task(stream.read(1 << 24))
        await found.until(lambda state: state["running"] == 1)
        await found.call("POST", "/mock/faults", {"hang": True})
        done, _ = await asyncio.wait([reading], timeout=0.3)
        assert not done
        await found.call("POST", "/mock/faults", {"hang": False})
        assert len(sse(await reading)) == 30


async def test_a_refusing_engine_answers_503() -> None:
    async with mocker("--fault-refuse") as found:
        response = await found.call("POST", COMPLETIONS, prompt(1))
        assert response.status == 503
        assert (await found.get("/mock/faults"))["refuse"] is True


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--fault-die-at-start", "CUDA out of memory"), 1, "RuntimeError: CUDA out of memory"),
        (("--model", "/nowhere"), 1, "/nowhere: no tokenizer.json there"),
        (("--profile", "/nowhere.json"), 1, "ProfileError: /nowhere.json: cannot read"),
        (("--num-gpu-blocks-override", "4"), 1, "needs more than the 64 tokens of KV cache"),
        (("--block-size", "0"), 2, "--block-size must be at least 1"),
    ],
)
async def test_a_start_that_fails_says_why(flags: tuple[str, ...], code: int, words: str) -> None:
    async with mocker(*flags, ready=False) as found:
        assert await found.exit_code() == code
        assert words in found.log[-1]


async def test_a_taken_port_is_named() -> None:
    async with mocker() as first, mocker("--port", str(first.origin.port), ready=False) as second:
        assert await second.exit_code() == 1
        assert f"PortInUse: 127.0.0.1:{first.origin.port}" in second.log[-1]


async def test_a_slow_start_can_be_ended() -> None:
    async with mocker("--fault-slow-start", "60", ready=False) as found:
        found.process.send_signal(signal.SIGTERM)
        assert await found.exit_code() == -signal.SIGTERM


async def test_sigterm_without_time_aborts_what_is_in_flight() -> None:
    async with mocker("--speedup", "1") as found:
        stream = await found.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 8000})
        await found.until(lambda state: state["running"] == 1)
        found.process.send_signal(signal.SIGTERM)
        events = sse(await stream.read(1 << 24))
        assert events[-1]["choices"][0]["finish_reason"] == "abort"
        assert await found.exit_code() == 0


async def test_sigterm_with_time_lets_requests_finish_and_aborts_new_ones() -> None:
    async with mocker("--speedup", "1", "--shutdown-timeout", "20") as found:
        stream = await found.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 100})
        await found.until(lambda state: state["running"] == 1)
        found.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            while (await found.post(COMPLETIONS, prompt(1)))["choices"][0]["finish_reason"] != "abort":
                pass
        refused = await found.post(COMPLETIONS, prompt(1))
        assert refused["choices"][0]["text"] == ""
        assert (await found.call("GET", "/health")).status == 200
        assert sse(await stream.read(1 << 24))[-1]["choices"][0]["finish_reason"] == "length"
        assert await found.exit_code() == 0
