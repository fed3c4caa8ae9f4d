"""Engines that refuse, die, stall or drain, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import openai
import pytest

from dynctl.frontend.retry import MAX_ATTEMPTS
from dynctl.http.server import Exchange, Request
from dynctl.protocol.specs import LimitsSpec, MigrationSpec
from tests.integration.frontend_harness import (
    Engine,
    answers,
    error_of,
    frontend,
    hangs,
    in_turn,
    make_spec,
    sse,
    status,
    token,
)

pytestmark = pytest.mark.usefixtures("each_relay")

COMPLETION = {"model": "m", "prompt": "hi"}
STREAMED = {**COMPLETION, "stream": True}
NEVER_MOVED = MigrationSpec(limit=0)


@pytest.fixture
def dead_url() -> str:
    """Where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


async def dies_before_answering(engine: Engine, request: Request, exchange: Exchange) -> None:
    exchange.on_disconnect = None
    exchange.abort()


def dies_after(*events: bytes) -> object:
    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in events:
            exchange.write(event)
            await asyncio.sleep(0.01)
        exchange.on_disconnect = None
        exchange.abort()

    return script


async def drains(engine: Engine, request: Request, exchange: Exchange) -> None:
    """What vLLM answers while it drains."""
    if json.loads(request.body).get("stream"):
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in sse(token("", "abort")):
            exchange.write(event)
        exchange.end()
        return
    exchange.respond(200, json.dumps({**token("", "abort")}).encode())


async def trickles(engine: Engine, request: Request, exchange: Exchange) -> None:
    """Tokens without end."""
    exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
    while True:
        exchange.write(sse(token("x"))[0])
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_a_worker_that_refuses_connections_is_replaced_and_then_avoided(
    body: dict[str, object], dead_url: str
) -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        front.join("aggregated", 1, dead_url)
        for _ in range(4):
            assert (await front.post("/v1/completions", body)).status == 200
        text = await front.metrics()
    assert len(engine.requests) == 4
    assert 'upstream_failures_total{reason="connect_failed",worker="aggregated-1"} 1.0' in text
    assert 'retries_total{reason="connect_failed"} 1.0' in text


async def test_a_shunned_worker_is_used_again_when_its_new_incarnation_comes(dead_url: str) -> None:
    engine = Engine()
    async with frontend(make_spec()) as front:
        await engine.start()
        front.join("aggregated", 0, dead_url)
        response = await front.post("/v1/completions", COMPLETION)
        assert (response.status, error_of(response)["type"]) == (502, "engine_failed")
        assert "127.0.0.1" not in error_of(response)["message"]
        front.join("aggregated", 0, engine.url, incarnation=2)
        assert (await front.post("/v1/completions", COMPLETION)).status == 200
        await engine.stop()


async def test_the_only_worker_is_tried_even_while_it_is_shunned() -> None:
    engine = Engine(in_turn(dies_before_answering, answers))
    async with frontend(make_spec(), aggregated=[engine]) as front:
        assert (await front.post("/v1/completions", COMPLETION)).status == 502
        assert (await front.post("/v1/completions", COMPLETION)).status == 200


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
@pytest.mark.parametrize("code", [429, 500, 503])
async def test_busy_and_failing_engines_are_replaced_before_the_first_byte(
    body: dict[str, object], code: int
) -> None:
    engines = [Engine(status(code)), Engine()]
    async with frontend(make_spec(), aggregated=engines) as front:
        for _ in range(2):
            assert (await front.post("/v1/completions", body)).status == 200
        await front.idle()
    assert len(engines[0].requests) >= 1


async def test_a_whole_answer_lost_half_way_is_asked_for_elsewhere() -> None:
    async def dies_half_way(engine: Engine, request: Request, exchange: Exchange) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
        exchange.start(200, headers, framing="raw")
        exchange.write(b'{"choices": [{"text": "ha')
        await asyncio.sleep(0.01)
        exchange.on_disconnect = None
        exchange.abort()

    engines = [Engine(dies_half_way), Engine()]
    async with frontend(make_spec(), aggregated=engines) as front:
        for _ in range(2):
            response = await front.post("/v1/completions", COMPLETION)
            assert json.loads(response.body)["choices"][0]["text"] == "abc"
        text = await front.metrics()
        await front.idle()
    assert len(engines[0].requests) >= 1
    assert 'model_migration_total{migration_type="new_request",model="m"}' in text


async def test_attempts_are_bounded_and_the_last_failure_is_told() -> None:
    engines = [Engine(status(500)) for _ in range(MAX_ATTEMPTS + 2)]
    async with frontend(make_spec(), aggregated=engines) as front:
        response = await front.post("/v1/completions", COMPLETION)
        assert (response.status, error_of(response)["type"]) == (502, "engine_failed")
        await front.idle()
    assert sum(len(engine.requests) for engine in engines) == MAX_ATTEMPTS


async def test_all_busy_is_503_with_retry_after() -> None:
    async with frontend(make_spec(), aggregated=[Engine(status(503))]) as front:
        response = await front.post("/v1/completions", COMPLETION)
        assert (response.status, error_of(response)["type"]) == (503, "service_unavailable")
        assert dict(response.headers)[b"retry-after"] == b"1"


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_a_draining_engines_empty_abort_is_not_an_answer(body: dict[str, object]) -> None:
    engines = [Engine(drains), Engine()]
    async with frontend(make_spec(), aggregated=engines) as front:
        for _ in range(2):
            response = await front.post("/v1/completions", body)
            assert response.status == 200
            assert b"abort" not in response.body
    assert len(engines[1].requests) == 2


async def test_an_error_as_first_event_of_a_stream_is_retried_elsewhere() -> None:
    async def refuses(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(b'data: {"error": {"message": "KV load failed"}}\n\n')
        await asyncio.Event().wait()

    engines = [Engine(refuses), Engine()]
    async with frontend(make_spec(), aggregated=engines) as front:
        response = await front.post("/v1/completions", STREAMED)
        assert b"error" not in response.body
        await engines[0].wait(lambda: engines[0].cancelled == 1)


async def test_a_worker_lost_mid_stream_ends_it_with_an_error_event() -> None:
    events = sse(token("a"), token("b"))[:2]
    engines = [Engine(dies_after(*events)), Engine()]  # type: ignore[arg-type]
    async with frontend(make_spec(migration=NEVER_MOVED), aggregated=engines) as front:
        response = await front.post("/v1/completions", STREAMED)
        text = await front.metrics()
    assert response.body.startswith(b"".join(events))
    last = response.body.removeprefix(b"".join(events))
    assert last.startswith(b"data: ")
    assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "engine_failed"
    assert engines[1].requests == []
    assert 'error_type="engine",model="m",request_type="stream",status="error"} 1.0' in text


async def test_the_openai_client_sees_the_error_of_a_broken_stream() -> None:
    engine = Engine(dies_after(*sse(token("a"))[:1]))  # type: ignore[arg-type]
    async with (
        frontend(make_spec(migration=NEVER_MOVED), aggregated=[engine]) as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.completions.create(model="m", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed"):
            async for _ in stream:
                pass


async def test_a_stream_cut_inside_an_event_is_cut_for_the_client_too() -> None:
    engine = Engine(dies_after(sse(token("a"))[0], b'data: {"choi'))  # type: ignore[arg-type]
    async with frontend(make_spec(migration=NEVER_MOVED), aggregated=[engine]) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.server.port)
        body = json.dumps(STREAMED).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
    assert answer.endswith(b'data: {"choi\r\n')


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_an_engine_that_never_answers_is_504_within_the_deadline(body: dict[str, object]) -> None:
    engines = [Engine(hangs), Engine(hangs)]
    limits = LimitsSpec(first_byte_timeout_s=0.2, request_timeout_s=0.6, stall_timeout_s=0.2)
    async with frontend(make_spec(limits=limits), aggregated=engines) as front:
        response = await front.post("/v1/completions", body)
        assert (response.status, error_of(response)["type"]) == (504, "timeout")
        assert 'error_type="response_timeout"' in await front.metrics()
        await front.idle()
    assert len(engines[0].requests) + len(engines[1].requests) == 1


async def test_a_stream_that_stalls_ends_with_an_error_event() -> None:
    async def stalls(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(sse(token("a"))[0])
        await asyncio.Event().wait()

    engine = Engine(stalls)
    limits = LimitsSpec(first_byte_timeout_s=0.3, request_timeout_s=10, stall_timeout_s=0.3)
    async with frontend(make_spec(limits=limits, migration=NEVER_MOVED), aggregated=[engine]) as front:
        response = await front.post("/v1/completions", STREAMED)
        assert b'"type":"timeout"' in response.body
        await engine.wait(lambda: engine.cancelled == 1)


async def test_the_whole_request_has_a_deadline_even_while_tokens_come() -> None:
    engine = Engine(trickles)
    limits = LimitsSpec(request_timeout_s=0.3)
    async with frontend(make_spec(limits=limits), aggregated=[engine]) as front:
        response = await front.post("/v1/completions", STREAMED)
        assert b'"type":"timeout"' in response.body
        await engine.wait(lambda: engine.cancelled == 1)


async def first_piece(pieces: AsyncIterator[bytes]) -> bytes:
    async for piece in pieces:
        return piece
    return b""


async def test_a_client_that_leaves_mid_stream_cancels_the_engines_request() -> None:
    engine = Engine(trickles)
    async with frontend(make_spec(), aggregated=[engine]) as front:
        pieces = front.pieces("/v1/completions", STREAMED)
        assert (await first_piece(pieces)).startswith(b"data: ")
        await pieces.aclose()  # type: ignore[attr-defined]
        await engine.wait(lambda: engine.cancelled == 1)
        text = await front.metrics()
        await front.idle()
    assert 'model_cancellation_total{endpoint="completions",model="m",request_type="stream"} 1.0' in text
    assert "disconnected_clients 1.0" in text
    assert 'inflight_requests{model="m"} 0.0' in text


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_a_client_that_leaves_before_the_answer_cancels_the_engines_request(
    body: dict[str, object],
) -> None:
    engine = Engine(hangs)
    async with frontend(make_spec(), aggregated=[engine]) as front:
        asking = asyncio.create_task(front.post("/v1/completions", body))
        await engine.wait(lambda: len(engine.requests) == 1)
        asking.cancel()
        await engine.wait(lambda: engine.cancelled == 1)
        assert 'error_type="cancelled"' in await front.metrics()


async def test_a_slow_reader_slows_its_engine_and_no_one_else() -> None:
    sent = 0

    async def floods(engine: Engine, request: Request, exchange: Exchange) -> None:
        nonlocal sent
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for _ in range(4000):
            await exchange.drained()
            exchange.write(b"data: " + b"x" * 8000 + b"\n\n")
            sent += 1
            await asyncio.sleep(0)
        exchange.end()

    slow, fast = Engine(in_turn(floods, answers)), Engine()
    async with frontend(make_spec(), aggregated=[slow, fast]) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.server.port)
        body = json.dumps(STREAMED).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await slow.wait(lambda: len(slow.requests) == 1)
        last = -1
        while sent != last:
            last = sent
            assert (await front.post("/v1/completions", COMPLETION)).status == 200
            await asyncio.sleep(0.1)
        assert sent < 4000
        received = 0
        while received < 4000 * 8000:
            received += len(await asyncio.wait_for(reader.read(1 << 20), 10))
        writer.close()
        await writer.wait_closed()
    assert sent == 4000
