"""What dynctl believes of vLLM, held against a real one: its events, metrics, model list and last words."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dynctl.engines.vllm import Vllm
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.kv.translate import Translator
from dynctl.protocol.kv_events import Removed, Stored
from dynctl.transport.engine_events import EngineEventSource, EngineSubscriber
from tests.engines.real_worker import BLOCK_SIZE, Worker, environment_of, tiny_launch

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
DEADLINE_S = 20.0


class Relay:
    """What the sidecar does with an engine's events, kept for looking at."""

    def __init__(self) -> None:
        self.reader = Vllm().kv_reader(0)
        self.translator = Translator(0)
        self.numbers: list[int] = []
        self.removed: list[int] = []
        self.resets: list[str] = []

    def on_batch(self, number: int, payload: bytes) -> None:
        self.numbers.append(number)
        for batch in self.reader.read(payload, time.time()):
            for event in self.translator.feed(batch):
                if isinstance(event, Removed):
                    self.removed.extend(event.hashes)

    def held(self) -> set[int]:
        return {name for stored in self.translator.snapshot() if _on_gpu(stored) for name in stored.hashes}

    async def until(self, seen: Callable[[], bool]) -> None:
        """Let events arrive until `seen`; fails after the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not seen():
            assert time.monotonic() < deadline, (self.numbers, self.resets)
            await asyncio.sleep(0.02)


def _on_gpu(stored: Stored) -> bool:
    return stored.tier == "G1"


@contextmanager
def subscribed(worker: Worker) -> Iterator[Relay]:
    source = Vllm().kv_source(worker.launch)
    assert source is not None
    relay = Relay()
    at = f"ipc://{worker.log.parent}/"
    both = (source.endpoints[0], source.replay_endpoints[0])
    live, replay = (endpoint.replace("ipc://", at) for endpoint in both)
    endpoint = EngineEventSource(live, replay, source.topic)
    subscriber = EngineSubscriber(endpoint, relay.on_batch, relay.resets.append)
    subscriber.start()
    try:
        yield relay
    finally:
        subscriber.close()


async def complete(worker: Worker, prompt: list[int], **more: Any) -> list[int]:
    """Greedy completion; the ids of the generated tokens."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True, **more}
    answer = await asyncio.to_thread(worker.post, "/v1/completions", body)
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def prompt_of(seed: int, blocks: int) -> list[int]:
    """Ids that no other seed shares a block with, and a few more that fill none."""
    return [3 + (seed * 7919 + number * 31) % 2000 for number in range(blocks * BLOCK_SIZE + 5)]


async def test_own_hashes_of_a_prompt_are_held_after_it_ran(worker: Worker) -> None:
    prompt = prompt_of(1, blocks=3)
    with subscribed(worker) as relay:
        await complete(worker, prompt)
        wanted = set(sequence_hashes(prompt, BLOCK_SIZE, root_hash()))
        await relay.until(lambda: wanted <= relay.held())
    assert len(wanted) == 3
    assert relay.resets == []


async def test_late_subscriber_gets_all_from_the_replay(worker: Worker) -> None:
    prompt = prompt_of(2, blocks=2)
    await complete(worker, prompt)
    with subscribed(worker) as relay:
        wanted = set(sequence_hashes(prompt, BLOCK_SIZE, root_hash()))
        await relay.until(lambda: wanted <= relay.held())
    assert relay.numbers == list(range(len(relay.numbers)))


async def test_generated_tokens_continue_the_chain(worker: Worker) -> None:
    prompt = prompt_of(3, blocks=1)
    with subscribed(worker) as relay:
        generated = await complete(worker, prompt, max_tokens=2 * BLOCK_SIZE)
        # The last token's KV values are computed only when a further one is asked for.
        wanted = sequence_hashes([*prompt, *generated[:-1]], BLOCK_SIZE, root_hash())
        await relay.until(lambda: set(wanted) <= relay.held())
    assert len(wanted) == 3


async def test_salt_gives_other_hashes(worker: Worker) -> None:
    prompt = prompt_of(4, blocks=2)
    with subscribed(worker) as relay:
        await complete(worker, prompt, cache_salt="tenant-1")
        salted = set(sequence_hashes(prompt, BLOCK_SIZE, root_hash(cache_salt="tenant-1")))
        await relay.until(lambda: salted <= relay.held())
    assert not relay.held() & set(sequence_hashes(prompt, BLOCK_SIZE, root_hash()))


async def test_evicted_blocks_are_removed(worker: Worker) -> None:
    first = prompt_of(100, blocks=6)
    with subscribed(worker) as relay:
        await complete(worker, first)
        wanted = sequence_hashes(first, BLOCK_SIZE, root_hash())
        await relay.until(lambda: set(wanted) <= relay.held())
        for seed in range(101, 127):
            await complete(worker, prompt_of(seed, blocks=6))
        await relay.until(lambda: set(wanted) <= set(relay.removed))
    assert not relay.held() & set(wanted)
    assert len(relay.held()) <= 128


async def test_load_and_facts_from_its_own_metrics(worker: Worker) -> None:
    prompt, engine = prompt_of(5, blocks=2), Vllm()

    def load() -> tuple[int, int]:
        (found,) = engine.load(worker.get(engine.load_path))
        assert (found.rank, found.kv_blocks) == (0, 128)
        return found.prefix_queries, found.prefix_hits

    await complete(worker, prompt)
    queries, hits = load()
    await complete(worker, prompt)
    assert load() == (queries + len(prompt), hits + 2 * BLOCK_SIZE)
    found = engine.info(worker.get(engine.readiness.models), worker.get(engine.load_path))
    assert (found.block_size, found.max_model_len, found.kv_blocks) == (BLOCK_SIZE, 2048, 128)


async def test_taken_port_is_what_the_last_words_tell(worker: Worker, tmp_path: Path) -> None:
    launch = tiny_launch("aggregated", http_port=worker.launch.ports["http"])
    (command,) = Vllm().commands(launch)
    done = await asyncio.to_thread(
        subprocess.run,
        command.argv,
        env=environment_of(command),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=200,
        check=False,
    )
    assert done.returncode != 0
    lines = Vllm().error_lines(done.stdout.decode("utf-8", "replace").splitlines(), 3)
    assert any("98" in line and "in use" in line for line in lines), lines
