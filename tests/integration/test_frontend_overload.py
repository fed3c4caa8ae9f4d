"""A frontend over engines that have too much to do, or that fail under it."""

from __future__ import annotations

import asyncio

from tests.integration.frontend_harness import Engine, error_of, frontend, make_spec, status

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
