"""Streams whose worker is lost while they run: mocker processes that are killed."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynctl.mocker
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import (
    DEADLINE_S,
    Front,
    frontend,
    make_spec,
)
from tests.integration.mocker_process import MockerProcess, mocker
from tests.unit import toy_engine as toy

ASSETS = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
CARD = ModelCard(name="m", path=str(ASSETS), block_size=16)
MOCK_CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Tell me of ZeroMQ."},
    ],
    "max_tokens": 60,
    "ignore_eos": True,
}
MOCK_COMPLETION = {
    "model": "m",
    "prompt": "Once upon a time there was a router. " * 20,
    "max_tokens": 60,
    "ignore_eos": True,
}
MOCKED = [("/v1/chat/completions", MOCK_CHAT), ("/v1/completions", MOCK_COMPLETION)]
_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


@asynccontextmanager
async def mocked(**roles: int) -> AsyncIterator[tuple[Front, dict[str, list[MockerProcess]]]]:
    """A frontend in kv mode over so many mocker processes of each role, at the speed of a real engine."""
    spec = make_spec(backend="mocker", model=CARD, roles=roles, router=RouterSpec(mode="kv"))
    processes: dict[str, list[MockerProcess]] = {}
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(frontend(spec))
        for role, number in roles.items():
            flags = ["--served-model-name", "m"]
            if role in _KV_ROLES:
                config = {"kv_connector": "NixlConnector", "kv_role": _KV_ROLES[role]}
                flags += ["--kv-transfer-config", json.dumps(config)]
            for index in range(number):
                process = await stack.enter_async_context(mocker(*flags))
                processes.setdefault(role, []).append(process)
                front.join(role, index, str(process.origin), model=CARD)  # type: ignore[arg-type]
        yield front, processes


async def busy(processes: list[MockerProcess]) -> MockerProcess:
    """The process that has a request."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for process in processes:
                if process.process.returncode is None and (await process.get("/mock/state"))["inflight"]:
                    return process
            await asyncio.sleep(0.01)


async def read_killing(
    front: Front,
    path: str,
    body: dict[str, Any],
    processes: list[MockerProcess],
    after: tuple[int, ...],
    *,
    hard: bool = True,
) -> toy.Answer:
    """Read a stream; each time so many events were read, the process that serves it is killed."""
    payload, left = b"", list(after)
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async for piece in front.pieces(path, streamed):
        payload += piece
        if left and payload.count(b"\n\n") >= left[0]:
            left.pop(0)
            process = await busy(processes)
            process.process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
            await process.process.wait()
    assert not left
    return toy.read(payload)


@pytest.mark.parametrize(("path", "body"), MOCKED)
@pytest.mark.parametrize("after", [(10,), (5, 25)])
async def test_killed_workers_leave_the_text_unbroken(
    path: str, body: dict[str, Any], after: tuple[int, ...]
) -> None:
    async with mocked(aggregated=3) as (front, processes):
        whole = await processes["aggregated"][0].post(path, body)
        got = await read_killing(front, path, body, processes["aggregated"], after)
        await front.idle()
        text = await front.metrics()
    check_mocked(got, whole)
    assert f'model_migration_total{{migration_type="ongoing_request",model="m"}} {len(after)}.0' in text


@pytest.mark.parametrize(("path", "body"), MOCKED)
async def test_killed_decode_workers_mean_a_new_prefill_and_the_same_text(
    path: str, body: dict[str, Any]
) -> None:
    async with mocked(prefill=1, decode=3) as (front, processes):
        whole = await processes["prefill"][0].post(path, body)
        got = await read_killing(front, path, body, processes["decode"], (8, 30))
        await front.idle()
        state = await processes["prefill"][0].get("/mock/state")
    check_mocked(got, whole)
    assert state["inflight"] == 0


@pytest.mark.parametrize(("path", "body"), MOCKED)
async def test_an_engine_that_ends_in_good_order_hands_its_streams_on(
    path: str, body: dict[str, Any]
) -> None:
    """On SIGTERM, vLLM without a drain time aborts what runs: `finish_reason` "abort" in mid-stream."""
    async with mocked(aggregated=2) as (front, processes):
        group = processes["aggregated"]
        whole = await group[0].post(path, body)
        got = await read_killing(front, path, body, group, (10,), hard=False)
    check_mocked(got, whole)


@pytest.mark.parametrize(("path", "body"), MOCKED)
@pytest.mark.parametrize("after", [(9,), (10,), (11,), (6, 24)])
async def test_text_held_back_for_stop_strings_does_not_break_the_word_it_ends_in(
    path: str, body: dict[str, Any], after: tuple[int, ...]
) -> None:
    asked = {**body, "temperature": 0, "stop": ["zebraquux", "notthere"]}
    async with mocked(aggregated=3) as (front, processes):
        whole = await processes["aggregated"][0].post(path, asked)
        got = await read_killing(front, path, asked, processes["aggregated"], after)
    check_mocked(got, whole)


async def test_all_streams_of_a_killed_worker_go_on_together() -> None:
    bodies = [
        {**MOCK_COMPLETION, "prompt": f"Story {number}: once upon a time. " * 8, "max_tokens": 150}
        for number in range(24)
    ]
    begun = [asyncio.Event() for _ in bodies]

    async def read(front: Front, number: int) -> toy.Answer:
        payload = b""
        streamed = {**bodies[number], "stream": True, "stream_options": {"include_usage": True}}
        async for piece in front.pieces("/v1/completions", streamed):
            begun[number].set()
            payload += piece
        return toy.read(payload)

    async with mocked(aggregated=3) as (front, processes):
        group = processes["aggregated"]
        whole = await asyncio.gather(*(group[0].post("/v1/completions", body) for body in bodies))
        asking = [asyncio.create_task(read(front, number)) for number in range(len(bodies))]
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*(one.wait() for one in begun))
        process = await busy(group[1:])
        process.process.send_signal(signal.SIGKILL)
        for got, wanted in zip(await asyncio.gather(*asking), whole, strict=True):
            check_mocked(got, wanted)
        await front.idle()
        assert "model_migration_total" in await front.metrics()


def check_mocked(got: toy.Answer, whole: dict[str, Any]) -> None:
    """The stream reads as the whole answer does."""
    choice = whole["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert got.text == text
    assert got.finishes == [choice["finish_reason"]]
    assert (got.dones, got.errors, len(got.heads)) == (1, 0, 1)
    assert got.usage is not None
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert got.usage[name] == whole["usage"][name]
