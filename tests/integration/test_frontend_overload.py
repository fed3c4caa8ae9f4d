"""A frontend over engines that have too much to do, or that fail under it."""

from __future__ import annotations

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
