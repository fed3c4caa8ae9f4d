"""A frontend over engines that have too much to do, or that fail under it."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import msgspec

from dynctl.http.client import Response
from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.specs import ApiKeySpec, BusySpec, FrontendSpec, QueueSpec, RouterSpec
from tests.contract.http_wire import until
from tests.integration.frontend_harness import (
    Engine,
    Front,
    answers,
    error_of,
    frontend,
    hangs,
    in_turn,
    make_spec,
    status,
)

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 3}


async def test_engines_that_all_have_too_much_to_do_are_a_429_that_says_when_to_come_back() -> None:
    """A 502 would look like a fault, a 503 as if nobody were there."""
    engines = [Engine(status(429)), Engine(status(429))]
    async with frontend(make_spec(), aggregated=engines) as front:
        response = await front.post("/v1/completions", COMPLETION)
        text = await front.metrics()
    assert (response.status, error_of(response)["code"]) == (429, "overloaded")
    assert int(dict(response.headers)[b"retry-after"]) >= 1
    assert 'error_type="overload"' in text


async def test_a_storm_of_refusals_opens_no_circuit_and_is_not_multiplied() -> None:
    """Each refused request tried thrice would treble the load that made the engines refuse."""
    engines = [Engine(status(503)) for _ in range(4)]
    async with frontend(make_spec(), aggregated=engines) as front:
        answers = [
            answer.status
            for _ in range(20)
            for answer in await asyncio.gather(
                *(front.post("/v1/completions", COMPLETION) for _ in range(20))
            )
        ]
        text = await front.metrics()
    asked = sum(len(engine.requests) for engine in engines)
    assert set(answers) == {503}
    assert asked < 2 * len(answers)
    for index in range(4):
        assert f'circuit_state{{worker="aggregated-{index}"}} 0.0' in text
    assert 'retries_refused_total{reason="rejected"}' in text


async def test_a_worker_that_is_gone_is_left_alone_and_says_so() -> None:
    engines = [Engine(), Engine()]
    async with frontend(make_spec(), aggregated=engines) as front:
        await engines[1].stop()
        for _ in range(6):
            assert (await front.post("/v1/completions", COMPLETION)).status == 200
        text = await front.metrics()
    assert 'circuit_state{worker="aggregated-1"} 2.0' in text
    assert 'circuit_opened_total{worker="aggregated-1"} 1.0' in text


def busy_spec(**queue: Any) -> FrontendSpec:
    """One request makes a worker busy."""
    router = RouterSpec(mode="least_loaded", queue=QueueSpec(**queue))
    return make_spec(router=router, busy=BusySpec(decode_blocks=0.0))


def tell_load(front: Front, blocks: int, waiting: int = 0, worker: str = "aggregated-0") -> None:
    """A load report as a sidecar would send it: `blocks` of 100 in use by others."""
    report = LoadReport(worker, 1, 0, running=0, waiting=waiting, kv_usage=blocks / 100, kv_blocks=100)
    front.core.router.on_load(report)


async def waiting(front: Front, count: int) -> None:
    """Until so many requests wait."""
    async with asyncio.timeout(10):
        while f'pending_requests{{model="m",policy_class="fcfs",worker_type="aggregated"}} {count}.0' not in (
            await front.metrics()
        ):
            pass


def ask(front: Front, prompt: str, **headers: str) -> asyncio.Task[Response]:
    return asyncio.create_task(front.post("/v1/completions", {**COMPLETION, "prompt": prompt}, headers))


async def test_a_full_queue_is_a_429_and_those_in_it_are_served_once_a_worker_is_free() -> None:
    async with frontend(busy_spec(limit=2), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        waiters = [ask(front, "1"), ask(front, "2")]
        await waiting(front, 2)
        refused = await front.post("/v1/completions", COMPLETION)
        assert (refused.status, error_of(refused)["code"]) == (429, "overloaded")
        assert int(dict(refused.headers)[b"retry-after"]) >= 1
        tell_load(front, 0)
        assert [(await one).status for one in waiters] == [200, 200]
        text = await front.metrics()
        await front.idle()
    assert (
        'router_queue_backpressure_total{model="m",policy_class="fcfs",worker_type="aggregated"} 1.0' in text
    )


async def test_without_a_queue_busy_workers_are_a_429_at_once() -> None:
    async with frontend(busy_spec(limit=0), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        assert (await front.post("/v1/completions", COMPLETION)).status == 429
        tell_load(front, 0)
        assert (await front.post("/v1/completions", COMPLETION)).status == 200


async def test_no_endpoint_that_is_work_passes_busy_workers_by() -> None:
    async with frontend(busy_spec(limit=0), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        for path in ("/v1/responses", "/v1/messages", "/v1/embeddings"):
            assert (await front.post(path, {"model": "m", "input": "hi"})).status == 429
        assert (await front.post("/tokenize", {"model": "m", "prompt": "hi"})).status == 200


async def test_a_prompt_that_is_not_tokenised_is_not_taken_for_the_shortest() -> None:
    spec = busy_spec(limit=9, policy="shortest")
    router = msgspec.structs.replace(spec.router, mode="kv")
    engine = Engine()
    async with frontend(msgspec.structs.replace(spec, router=router), aggregated=[engine]) as front:
        tell_load(front, 50)
        long = ask(front, "long " * 1000)
        await until(lambda: front.core.gate._queue.waiting.requests == 1)
        assert front.core.gate._queue.waiting.tokens > 1000
        tell_load(front, 0)
        assert (await long).status == 200


async def test_who_waits_too_long_gets_a_429_and_its_place_is_free() -> None:
    async with frontend(busy_spec(limit=1, deadline_s=0.1), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        late = await front.post("/v1/completions", COMPLETION)
        assert (late.status, error_of(late)["code"]) == (429, "overloaded")
        await waiting(front, 0)


async def test_a_client_that_leaves_the_queue_frees_its_place() -> None:
    engine = Engine()
    async with frontend(busy_spec(limit=1), aggregated=[engine]) as front:
        tell_load(front, 50)
        leaves = ask(front, "leaves")
        await waiting(front, 1)
        leaves.cancel()
        await waiting(front, 0)
        stays = ask(front, "stays")
        await waiting(front, 1)
        tell_load(front, 0)
        assert (await stays).status == 200
        await front.idle()
    assert [body["prompt"] for body in engine.bodies()] == ["stays"]


async def test_workers_over_a_threshold_get_nothing_while_another_is_under_it() -> None:
    engines = [Engine(), Engine()]
    async with frontend(busy_spec(), aggregated=engines) as front:
        tell_load(front, 50)
        tell_load(front, 0, worker="aggregated-1")
        for _ in range(6):
            assert (await front.post("/v1/completions", COMPLETION)).status == 200
    assert (len(engines[0].requests), len(engines[1].requests)) == (0, 6)


async def test_no_worker_at_all_is_a_503_not_a_wait() -> None:
    async with frontend(busy_spec()) as front:
        assert (await front.post("/v1/completions", COMPLETION)).status == 503


async def test_those_who_wait_when_the_last_worker_goes_are_told_so() -> None:
    async with frontend(busy_spec(), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        left = ask(front, "x")
        await waiting(front, 1)
        front.core.members_changed([], ["aggregated-0"])
        assert (await left).status == 503


async def test_a_key_with_too_many_requests_is_a_429_and_its_next_one_is_served_when_one_has_ended() -> None:
    engine = Engine(in_turn(hangs, answers))
    digest = hashlib.sha256(b"right").hexdigest()
    spec = make_spec(api_keys=[ApiKeySpec(name="team", sha256=digest, max_concurrent=1)])
    key = {"authorization": "Bearer right"}
    async with frontend(spec, aggregated=[engine]) as front:
        first = asyncio.create_task(front.post("/v1/completions", COMPLETION, key))
        await engine.wait(lambda: len(engine.requests) == 1)
        refused = await front.post("/v1/completions", COMPLETION, key)
        assert (refused.status, error_of(refused)["code"]) == (429, "overloaded")
        assert int(dict(refused.headers)[b"retry-after"]) >= 1
        first.cancel()
        await engine.wait(lambda: engine.cancelled == 1)
        assert (await front.post("/v1/completions", COMPLETION, key)).status == 200
        text = await front.metrics()
    assert 'api_key_rejections_total{key="team"} 1.0' in text
    assert "right" not in text
    assert digest not in text


async def test_what_a_client_says_of_its_priority_and_what_its_prompt_is_reach_the_queue() -> None:
    busy = BusySpec(decode_blocks=0.0)
    async with frontend(make_spec(busy=busy), aggregated=[Engine()]) as front:
        tell_load(front, 50)
        one = ask(front, "urgent", **{"x-dynctl-priority": "60"})
        await waiting(front, 1)
        (place,) = front.core.gate._turns
        assert place.ask.priority == 60
        front.core.gate.thresholds = BusySpec()
        assert (await one).status == 200
