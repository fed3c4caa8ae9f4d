"""Streams whose worker is lost while they run: scripted engines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

import dynctl.mocker
from dynctl.frontend.migrate import Story
from dynctl.http.client import Timeouts
from dynctl.http.server import Exchange, Request
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import LimitsSpec, MigrationSpec, RouterSpec
from tests.contract.http_wire import until
from tests.integration.frontend_harness import (
    DEADLINE_S,
    Engine,
    Front,
    Script,
    frontend,
    hangs,
    in_turn,
    make_spec,
    sse,
    status,
    token,
)
from tests.unit import toy_engine as toy

pytestmark = pytest.mark.usefixtures("each_relay")

TINY = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
COMPLETION = {"model": "m", "prompt": "P:", "max_tokens": 20, "stream": True}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 20, "stream": True}


def says(events: int | None = None, *tail: bytes, ends: bool = False) -> Script:
    """An engine that says so many events of the toy's answer and `tail`; then it is lost, or `ends`."""

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        body = json.loads(request.body)
        told = toy.serve(body, len(engine.requests))
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in (told[:events] if events is not None else told) + list(tail):
            exchange.write(event)
            await asyncio.sleep(0.001)
        if events is None or ends:
            exchange.end()
            return
        exchange.on_disconnect = None
        exchange.abort()

    return script


async def freezes(engine: Engine, request: Request, exchange: Exchange) -> None:
    """An engine that says four events and nothing more."""
    exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
    for event in toy.serve(json.loads(request.body))[:4]:
        exchange.write(event)
    await asyncio.Event().wait()


async def floods(engine: Engine, request: Request, exchange: Exchange) -> None:
    """An engine that says 20 MB as fast as they are taken."""
    exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
    for _ in range(400):
        exchange.write(b"data: " + json.dumps(token("x" * 50_000)).encode() + b"\n\n")
        await exchange.drained()
        await asyncio.sleep(0)
    exchange.write(b"".join(sse(token("", "stop"))))
    exchange.end()


async def test_a_client_that_reads_nothing_holds_up_the_next_worker_too() -> None:
    engines = [Engine(floods), Engine(floods)]
    async with frontend(make_spec(), aggregated=engines) as front:
        timeouts = Timeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)
        body = json.dumps({**COMPLETION, "max_tokens": 10_000}).encode()
        stream = await front.client.open(
            front.origin, "POST", "/v1/completions", body=body, timeouts=timeouts
        )
        (client,) = (one for one in front.server._connections if one.busy)
        await until(lambda: client.write_paused)
        first, other = (0, 1) if engines[0].requests else (1, 0)
        front.core.members_changed([], [f"aggregated-{first}"])
        await engines[other].wait(lambda: bool(engines[other].requests))
        assert client._transport is not None
        for _ in range(20):
            await asyncio.sleep(0.01)
            assert client._transport.get_write_buffer_size() < 2_000_000
        stream.abort()
        await front.idle()


async def read(front: Front, body: dict[str, Any], path: str = "/v1/completions") -> toy.Answer:
    response = await front.post(path, body)
    assert response.status == 200, response.body
    return toy.read(response.body)


def same(got: toy.Answer, body: dict[str, Any]) -> None:
    """It reads as if nothing had happened."""
    whole = toy.read(b"".join(toy.serve(body)))
    assert (got.text, got.finishes, got.errors) == (whole.text, whole.finishes, 0)
    assert (got.roles, got.dones, len(got.heads)) == (whole.roles, 1, 1)


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)])
async def test_a_lost_stream_goes_on_elsewhere_and_is_counted(path: str, body: dict[str, Any]) -> None:
    engines = [Engine(in_turn(says(4), says())), Engine(in_turn(says(3), says()))]
    async with frontend(make_spec(), aggregated=engines) as front:
        got = await read(front, body, path)
        text = await front.metrics()
        await front.idle()
    same(got, body)
    assert sum(len(engine.requests) for engine in engines) == 3
    labels = 'migration_type="ongoing_request",model="m"'
    assert f"model_migration_total{{{labels}}} 2.0" in text
    assert f'model_migration_duration_seconds_count{{{labels},outcome="success"}} 2.0' in text
    assert 'error_type="",model="m",request_type="stream",status="success"} 1.0' in text


@pytest.mark.parametrize(
    "tail",
    [
        b'data: {"id":"x","choices":[{"index":0,"text":"","finish_reason":"abort"}]}\n\n',
        b'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n',
        b'data: {"id":"x","choi',
        b"",
    ],
)
async def test_an_abort_an_error_half_an_event_or_no_finish_is_a_lost_stream(tail: bytes) -> None:
    last = [tail, b"data: [DONE]\n\n"] if tail.endswith(b"\n\n") else [tail] if tail else []
    engines = [Engine(in_turn(says(4, *last, ends=True), says())), Engine(says())]
    async with frontend(make_spec(), aggregated=engines) as front:
        got = await read(front, COMPLETION)
    same(got, COMPLETION)


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("n", 2, "several answers"),
        ("response_format", {"type": "json_object"}, "response_format"),
        ("guided_json", {"type": "object"}, "guided_json"),
        ("echo", True, "echo"),
    ],
)
async def test_what_cannot_go_on_ends_with_a_clear_error(field: str, value: Any, why: str) -> None:
    engines = [Engine(says(4)), Engine(says(4))]
    async with frontend(make_spec(), aggregated=engines) as front:
        response = await front.post("/v1/completions", {**COMPLETION, field: value})
        await front.idle()
    last = response.body.decode().strip().split("\n\n")[-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["type"] == "engine_failed"
    assert why in error["message"]
    assert "127.0.0.1" not in error["message"]
    assert sum(len(engine.requests) for engine in engines) == 1


async def test_a_stream_is_not_moved_for_ever() -> None:
    engine = Engine(says(3))
    async with frontend(make_spec(migration=MigrationSpec(limit=2)), aggregated=[engine]) as front:
        got = await read(front, {**COMPLETION, "max_tokens": 40})
        await front.idle()
    assert (got.errors, got.dones) == (1, 0)
    assert len(engine.requests) == 3


async def test_a_stream_too_long_to_be_computed_anew_ends_and_is_counted() -> None:
    engine = Engine(says(8))
    async with frontend(make_spec(migration=MigrationSpec(max_tokens=5)), aggregated=[engine]) as front:
        got = await read(front, COMPLETION)
        assert 'model_migration_max_seq_len_exceeded_total{model="m"} 1.0' in await front.metrics()
    assert got.errors == 1


async def test_the_openai_client_reads_through_a_migration() -> None:
    engines = [Engine(in_turn(says(6), says())), Engine(says())]
    async with (
        frontend(make_spec(), aggregated=engines) as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.completions.create(model="m", prompt="P:", max_tokens=20, stream=True)
        text = "".join([chunk.choices[0].text async for chunk in stream])
    assert text == toy.FULL[: toy.BOUNDS[20]]


async def test_the_deadline_bounds_all_legs_together() -> None:
    async def stalls(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(toy.serve(json.loads(request.body))[0])
        await asyncio.Event().wait()

    engine = Engine(stalls)
    limits = LimitsSpec(first_byte_timeout_s=0.2, request_timeout_s=0.7, stall_timeout_s=0.2)
    async with frontend(make_spec(limits=limits), aggregated=[engine]) as front:
        response = await front.post("/v1/completions", {**COMPLETION, "max_tokens": 50})
        assert b'"type":"timeout"' in response.body
        await front.idle()


@pytest.mark.parametrize("how", ["silent", "removed", "replaced"])
async def test_membership_fails_the_legs_of_a_worker_that_is_gone(how: str) -> None:
    engines = [Engine(freezes), Engine(says())]
    async with frontend(make_spec(), aggregated=engines[:1]) as front:
        asking = asyncio.create_task(read(front, COMPLETION))
        await engines[0].wait(lambda: len(engines[0].requests) == 1)
        await asyncio.sleep(1.2)  # a stream that was heard of within the last look is spared by `silent`
        await engines[1].start()
        front.join("aggregated", 1, engines[1].url)
        if how == "removed":
            front.core.members_changed([], ["aggregated-0"])
        elif how == "silent":
            front.join("aggregated", 0, engines[0].url, state="silent")
        else:
            front.join("aggregated", 0, engines[1].url, incarnation=2)
        same(await asking, COMPLETION)
        await front.idle()
        await engines[1].stop()


async def test_a_controller_that_comes_back_and_tells_of_the_same_workers_cuts_no_stream() -> None:
    told = asyncio.Event()

    async def pauses(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for number, event in enumerate(toy.serve(json.loads(request.body))):
            if number == 4:
                await told.wait()
            exchange.write(event)
        exchange.end()

    engine = Engine(pauses)
    async with frontend(make_spec(), aggregated=[engine]) as front:
        asking = asyncio.create_task(read(front, COMPLETION))
        await engine.wait(lambda: len(engine.requests) == 1)
        for state in ("ready", "draining", "ready"):
            front.join("aggregated", 0, engine.url, state=state)
        told.set()
        same(await asking, COMPLETION)
        assert engine.cancelled == 0
    assert len(engine.requests) == 1


async def test_a_request_waits_for_a_worker_to_come_back_when_half_was_said() -> None:
    engines = [Engine(freezes), Engine(says())]
    async with frontend(make_spec(), aggregated=engines[:1]) as front:
        asking = asyncio.create_task(read(front, COMPLETION))
        await engines[0].wait(lambda: len(engines[0].requests) == 1)
        await asyncio.sleep(0.2)
        front.core.members_changed([], ["aggregated-0"])
        await engines[1].start()
        await asyncio.sleep(0.3)
        front.join("aggregated", 1, engines[1].url)
        same(await asking, COMPLETION)
        await engines[1].stop()


async def test_a_client_that_leaves_during_a_migration_leaves_nothing_behind() -> None:
    engine = Engine(in_turn(says(4), hangs))
    async with frontend(make_spec(), aggregated=[engine]) as front:
        asking = asyncio.create_task(read(front, COMPLETION))
        await engine.wait(lambda: len(engine.requests) == 2)
        asking.cancel()
        await engine.wait(lambda: engine.cancelled == 1)
        text = await front.metrics()
        await front.idle()
    assert 'outcome="cancelled"' in text


async def test_a_rest_that_prefill_alone_has_said_ends_the_stream() -> None:
    """A context-first engine answers whole when nothing is left to generate."""
    whole = toy.read(b"".join(toy.serve(COMPLETION)))

    async def prefills(engine: Engine, request: Request, exchange: Exchange) -> None:
        said = json.loads(request.body)["prompt"].removeprefix("P:")
        choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "length"}
        choice["disaggregated_params"] = {"ctx_request_id": len(engine.requests)}
        if said:
            choice = {"index": 0, "text": whole.text[len(said) :], "finish_reason": "stop"}
        answer = {"object": "text_completion", "choices": [choice], "prompt_token_ids": [1]}
        exchange.respond(200, json.dumps(answer).encode())

    async def decodes(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in toy.serve(COMPLETION)[:4]:
            exchange.write(event)
            await asyncio.sleep(0.001)
        exchange.on_disconnect = None
        exchange.abort()

    spec = make_spec(backend="trtllm", roles={"prefill": 1, "decode": 1})
    async with frontend(spec, prefill=[Engine(prefills)], decode=[Engine(decodes), Engine(decodes)]) as front:
        got = await read(front, COMPLETION)
        await front.idle()
    assert (got.text, got.finishes, got.dones, got.errors) == (whole.text, ["stop"], 1, 0)


@pytest.mark.parametrize(("code", "error_type"), [(400, "engine"), (503, "unavailable")])
async def test_a_worker_that_will_not_go_on_ends_the_stream_with_an_error(
    code: int, error_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynctl.frontend.pipeline.PATIENCE_S", 0.5)
    engine = Engine(in_turn(says(4), status(code)))
    async with frontend(make_spec(), aggregated=[engine]) as front:
        got = await read(front, COMPLETION)
        text = await front.metrics()
        await front.idle()
    assert (got.errors, got.dones) == (1, 0)
    assert f'error_type="{error_type}"' in text
    assert 'outcome="failure"' in text


# --- events that are long, or in pieces


def long_first(size: int) -> Script:
    """An engine whose first event has a prompt's token ids, and that is lost after it the first time."""

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        if isinstance(json.loads(request.body)["prompt"], list):
            exchange.write(b"".join(sse(token("b", "stop"))))
            exchange.end()
            return
        first = token("a")
        first["choices"][0].update(token_ids=[1], prompt_token_ids=[10**5] * (size // 8))
        event = sse(first)[0]
        for start in range(0, len(event), 50_000):
            exchange.write(event[start : start + 50_000])
            await asyncio.sleep(0.001)
        exchange.on_disconnect = None
        exchange.abort()

    return script


async def test_a_stream_goes_on_after_an_event_of_many_kilobytes() -> None:
    async with frontend(make_spec(), aggregated=[Engine(long_first(600_000))]) as front:
        got = await read(front, {**COMPLETION, "return_token_ids": True})
    assert (got.text, got.finishes, got.errors) == ("ab", ["stop"], 0)


async def test_the_client_is_told_why_a_stream_of_huge_events_cannot_go_on() -> None:
    async with frontend(make_spec(), aggregated=[Engine(long_first(5_000_000))]) as front:
        response = await front.post("/v1/completions", COMPLETION)
    assert b"cannot go on elsewhere: one event of it is over 4 MiB" in response.body


async def test_the_prompt_counts_against_the_limit_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def floods_then_dies(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for number in range(1500):
            exchange.write(sse(token(f"{number} "))[0])
            await exchange.drained()
            await asyncio.sleep(0)
        exchange.on_disconnect = None
        exchange.abort()

    seen: list[bool] = []
    keep = Story.keep

    def watched(self: Story, pieces: list[bytes]) -> bool:
        seen.append(keep(self, pieces))
        return seen[-1]

    monkeypatch.setattr(Story, "keep", watched)
    spec = make_spec(
        model=ModelCard(name="m", path=str(TINY), block_size=16),
        router=RouterSpec(mode="kv"),
        migration=MigrationSpec(max_tokens=1200),
        limits=LimitsSpec(),
    )
    body = {**COMPLETION, "prompt": [7] * 1000, "max_tokens": 5000}
    async with frontend(spec, aggregated=[Engine(floods_then_dies)]) as front:
        response = await front.post("/v1/completions", body)
        text = await front.metrics()
    assert seen[0] is False
    assert b"it is over 1200 tokens" in response.body
    assert 'model_migration_max_seq_len_exceeded_total{model="m"} 1.0' in text


@pytest.mark.parametrize("tail", [3, 40, 90, 110])
async def test_half_a_finish_at_a_connections_end_is_no_answer(tail: int) -> None:
    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        told = toy.serve(json.loads(request.body), len(engine.requests))
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="raw")
        last = told[-2]
        if len(engine.requests) == 1:
            told = [*told[:-2], last[: len(last) - tail]]
        for event in told:
            exchange.write(event)
            await asyncio.sleep(0.001)
        exchange.end()

    async with frontend(make_spec(), aggregated=[Engine(script)]) as front:
        got = await read(front, COMPLETION)
    same(got, COMPLETION)


@pytest.mark.parametrize("eol", [b"\n\n", b"\r\n\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("size", [7, 100, 1000])
async def test_a_worker_lost_anywhere_in_a_chunk_leaves_a_stream_that_goes_on(eol: bytes, size: int) -> None:
    cuts = list(range(300, 1700, 130))

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        told = b"".join(toy.serve(json.loads(request.body), len(engine.requests))).replace(b"\n\n", eol)
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        dies = len(engine.requests) % 2 == 1
        said = told[: cuts[-1]] if dies else told
        for start in range(0, len(said), size):
            exchange.write(said[start : start + size])
            await asyncio.sleep(0)
        if not dies:
            exchange.end()
            return
        await asyncio.sleep(0.005)
        exchange.on_disconnect = None
        exchange.abort()

    async with frontend(make_spec(), aggregated=[Engine(script)]) as front:
        while cuts:
            response = await front.post("/v1/completions", COMPLETION)
            cuts.pop()
            same(toy.read(response.body.replace(b"\r\n", b"\n")), COMPLETION)
