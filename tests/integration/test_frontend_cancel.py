"""Clients that go away: every leg ends at its engine, in whatever phase, nothing stays counted."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from tests.integration.frontend_harness import DEADLINE_S, Engine, Front, frontend, hangs, make_spec, status
from tests.integration.mocker_process import MockerProcess
from tests.integration.test_frontend_migration_mocker import MOCK_CHAT, MOCK_COMPLETION, mocked

pytestmark = pytest.mark.usefixtures("each_relay")

logger = logging.getLogger(__name__)

LONG = {"max_tokens": 2000}
PROMPT = "Once upon a time there was a router. " * 300
PHASES = [
    pytest.param("/v1/chat/completions", {**MOCK_CHAT, **LONG}, id="chat"),
    pytest.param("/v1/completions", {**MOCK_COMPLETION, **LONG}, id="completion"),
]


async def inflight(processes: list[MockerProcess]) -> int:
    states = [await process.get("/mock/state") for process in processes]
    return sum(state["inflight"] for state in states)


async def until(processes: list[MockerProcess], wanted: int) -> float:
    """Seconds until all have `wanted` requests between them."""
    began = time.monotonic()
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await inflight(processes) == wanted:
                return time.monotonic() - began
            await asyncio.sleep(0.002)


async def ended(front: Front, processes: list[MockerProcess], phase: str) -> None:
    """Nothing is left of the request, at the engines and in the frontend."""
    took_s = await until(processes, 0)
    logger.info("cancelled while %s: engines idle after %.0f ms", phase, took_s * 1000)
    await front.idle()
    text = await front.metrics()
    assert 'inflight_requests{model="m"} 0.0' in text
    assert 'error_type="cancelled"' in text


@pytest.mark.parametrize(("path", "body"), PHASES)
@pytest.mark.parametrize("roles", [{"aggregated": 1}, {"prefill": 1, "decode": 1}], ids=["one", "apart"])
async def test_leaving_a_stream_ends_it_at_its_engines(
    path: str, body: dict[str, Any], roles: dict[str, int]
) -> None:
    async with mocked(**roles) as (front, by_role):
        processes = [process for group in by_role.values() for process in group]
        pieces = front.pieces(path, {**body, "stream": True})
        assert await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]
        await ended(front, processes, f"streaming, {'+'.join(roles)}")


@pytest.mark.parametrize("roles", [{"aggregated": 1}, {"prefill": 1, "decode": 1}], ids=["one", "apart"])
async def test_leaving_a_whole_answer_ends_it_at_its_engines(roles: dict[str, int]) -> None:
    async with mocked(**roles) as (front, by_role):
        processes = [process for group in by_role.values() for process in group]
        asking = asyncio.create_task(front.post("/v1/chat/completions", {**MOCK_CHAT, **LONG}))
        await until(by_role.get("decode", processes), 1)
        asking.cancel()
        await ended(front, processes, f"waiting for a whole answer, {'+'.join(roles)}")


async def test_leaving_during_prefill_ends_it_there() -> None:
    async with mocked(prefill=1, decode=1) as (front, by_role):
        body = {"model": "m", "prompt": PROMPT, "max_tokens": 5, "stream": True}
        asking = asyncio.create_task(front.post("/v1/completions", body))
        await until(by_role["prefill"], 1)
        asking.cancel()
        await ended(front, by_role["prefill"], "prefilling")
        assert await inflight(by_role["decode"]) == 0


async def test_leaving_while_a_failed_attempt_is_about_to_be_made_again_sends_no_more() -> None:
    engine = Engine(status(500))
    async with frontend(make_spec(), aggregated=[engine]) as front:
        front.join("aggregated", 1, engine.url)
        for number in range(1, 20):
            asking = asyncio.create_task(front.post("/v1/completions", {"model": "m", "prompt": "hi"}))
            await engine.wait(lambda number=number: len(engine.requests) >= number)  # type: ignore[misc]
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await front.idle()
        text = await front.metrics()
    assert 'inflight_requests{model="m"} 0.0' in text
    assert 'error_type="cancelled"' in text


async def test_leaving_a_hung_engine_frees_it_at_once() -> None:
    engine = Engine(hangs)
    async with frontend(make_spec(), aggregated=[engine]) as front:
        asking = [
            asyncio.create_task(front.post("/v1/completions", {"model": "m", "prompt": "x", "stream": s}))
            for s in (False, True)
        ]
        await engine.wait(lambda: len(engine.requests) == 2)
        for task in asking:
            task.cancel()
        await engine.wait(lambda: engine.cancelled == 2)
        await front.idle()
