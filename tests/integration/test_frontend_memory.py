"""What a frontend keeps of the requests it has answered: nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from dynctl.frontend.answer import Answer
from dynctl.frontend.body import Body
from dynctl.frontend.call import Call
from dynctl.frontend.cutter import Cutter
from dynctl.frontend.migrate import Rest, Story
from dynctl.frontend.stream import Relay
from dynctl.frontend.upstream import Leg
from dynctl.http.server import Exchange, Request
from dynctl.http.stream import Stream
from tests.integration.frontend_harness import Engine, Front, answers, chat_token, frontend, make_spec, sse

OF_A_REQUEST = (Answer, Body, Call, Cutter, Leg, Relay, Rest, Story, Exchange, Stream)
STREAMS = 30


async def dies_once(engine: Engine, request: Request, exchange: Exchange) -> None:
    """An engine that is lost when it is asked, and goes on with what another one has said."""
    if len(json.loads(request.body)["messages"]) > 1:
        await answers(engine, request, exchange)
        return
    exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
    exchange.write(sse(chat_token("a"))[0])
    await asyncio.sleep(0.002)
    exchange.on_disconnect = None
    exchange.abort()


async def ask(front: Front, number: int, how: str) -> None:
    messages = [{"role": "user", "content": f"hi {number}"}]
    body = {"model": "m", "stream": how != "whole", "messages": messages}
    if how == "cut":
        async for _ in front.pieces("/v1/chat/completions", body):
            break
        return
    response = await front.post("/v1/chat/completions", body)
    assert response.status == 200
    assert b'"error"' not in response.body


def left() -> Counter[str]:
    """What there is of requests."""
    for _ in range(3):
        gc.collect()
    kinds: Counter[str] = Counter()
    for one in gc.get_objects():
        kind: Any = type(one)
        if kind in OF_A_REQUEST:
            kinds[kind.__name__] += 1
    return kinds


@pytest.fixture
def silent() -> Iterator[None]:
    """Nothing is logged: pytest would keep it, and with an error all that was under way when it came."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("how", ["whole", "plain", "cut", "migrated"])
async def test_nothing_is_left_of_requests_that_are_over(how: str, silent: None) -> None:
    engines = [Engine(dies_once if how == "migrated" else answers) for _ in range(2)]
    async with frontend(make_spec(), aggregated=engines) as front:
        for number in range(STREAMS):
            await ask(front, number, how)
        await front.idle()
        for engine in engines:
            engine.requests.clear()
        kept = left()
    # A connection that is kept open may remember its last answer.
    assert sum(kept.values()) <= len(engines), kept
