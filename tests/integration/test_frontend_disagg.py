"""Prefill and decode apart: the hand-off is used once, whole and in time, or not at all."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest

from dynctl.engines import catalog
from dynctl.engines.base import Handoff
from dynctl.frontend.retry import MAX_ATTEMPTS
from dynctl.http.server import Exchange, Request
from dynctl.protocol.specs import ConditionalDisaggSpec, FrontendSpec, LimitsSpec, RouterSpec
from tests.integration.frontend_harness import (
    Engine,
    Front,
    Script,
    answers,
    error_of,
    frontend,
    hangs,
    in_turn,
    make_spec,
    status,
)

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 9, "temperature": 0.5}
STREAMED = {**COMPLETION, "stream": True, "stream_options": {"include_usage": True}}
PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_engine_id": "e",
    "remote_request_id": "r",
    "remote_host": "h",
    "remote_port": 5600,
    "remote_block_ids": [[1, 2]],
    "tp_size": 1,
    "made_up_in_a_later_version": {"x": 1.5},
}


def vllm(**fields: Any) -> FrontendSpec:
    return make_spec(backend="vllm", roles={"prefill": 1, "decode": 1}, **fields)


def prefilled(**changes: Any) -> Script:
    """A prefill worker whose answer carries PARAMS, changed by `changes` (None = left out)."""
    params = {name: value for name, value in {**PARAMS, **changes}.items() if value is not None}

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        choice = {"index": 0, "text": "z", "finish_reason": "length"}
        unique = {**params, "remote_request_id": f"r{len(engine.requests)}"} if params else None
        exchange.respond(200, json.dumps({"choices": [choice], "kv_transfer_params": unique}).encode())

    return script


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_prefill_then_decode_with_its_params(body: dict[str, Any]) -> None:
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        response = await front.post("/v1/completions", body)
        assert response.status == 200
        assert dict(response.headers)[b"x-dynctl-workers"] == b"prefill-0,decode-0"
        await front.idle()
        transfers = re.search(r"kv_transfer_estimated_latency_seconds_count\S* (\S+)", await front.metrics())
        assert transfers is not None
        assert transfers[1] == ("1.0" if "stream" in body else "0.0")
    asked = prefill.bodies()[0]
    assert asked["kv_transfer_params"] == {"do_remote_decode": True, "do_remote_prefill": False}
    assert (asked["max_tokens"], asked["stream"], asked["prompt"]) == (1, False, "hi")
    assert "stream_options" not in asked
    assert decode.bodies()[0] == {**body, "kv_transfer_params": {**PARAMS, "remote_request_id": "r1"}}
    assert prefill.requests[0].header(b"x-request-id") == decode.requests[0].header(b"x-request-id")


async def test_params_of_a_client_never_get_through() -> None:
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        evil = {**COMPLETION, "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "evil"}}
        await front.post("/v1/completions", evil)
        await front.post("/v1/responses", {"model": "m", "input": "x", "kv_transfer_params": {"a": 1}})
    assert decode.bodies()[0]["kv_transfer_params"]["remote_host"] == "h"
    assert "kv_transfer_params" not in decode.bodies()[1]
    assert len(prefill.requests) == 1


async def test_several_sequences_go_to_decode_alone() -> None:
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        for change in ({"n": 2}, {"prompt": ["a", "b"]}, {"prompt": [[1], [2]]}, {"best_of": 2}):
            assert (await front.post("/v1/completions", {**COMPLETION, **change})).status == 200
    assert prefill.requests == []
    assert all("kv_transfer_params" not in body for body in decode.bodies())


@pytest.mark.parametrize(
    "broken",
    [
        prefilled(remote_port=None),
        prefilled(remote_block_ids=[[]]),
        prefilled(tp_size=None),
        status(200, {"choices": [{"finish_reason": "length"}]}),
        status(200, {"choices": [{"finish_reason": "abort"}], "kv_transfer_params": PARAMS}),
        status(200, []),
        status(200, {}),
    ],
)
async def test_incomplete_params_never_reach_decode(broken: Script) -> None:
    prefill, decode = Engine(broken), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        response = await front.post("/v1/completions", COMPLETION)
        assert (response.status, error_of(response)["type"]) == (502, "engine_failed")
        assert 'handoffs_refused_total{reason="incomplete"} 1.0' in await front.metrics()
    assert decode.requests == []


async def test_incomplete_params_make_another_worker_prefill() -> None:
    engines = [Engine(prefilled(remote_port=None)), Engine(prefilled())]
    decode = Engine()
    async with frontend(vllm(), prefill=engines, decode=[decode]) as front:
        for _ in range(2):
            assert (await front.post("/v1/completions", COMPLETION)).status == 200
    assert len(engines[1].requests) == 2
    assert all("remote_port" in body["kv_transfer_params"] for body in decode.bodies())


@pytest.mark.parametrize("code", [500, 503])
async def test_a_prefill_that_fails_is_retried_elsewhere_or_told(code: int) -> None:
    good, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[Engine(status(code)), good], decode=[decode]) as front:
        for _ in range(2):
            assert (await front.post("/v1/completions", STREAMED)).status == 200
    assert len(good.requests) == 2
    decode = Engine()
    async with frontend(vllm(), prefill=[Engine(status(code))], decode=[decode]) as front:
        assert (await front.post("/v1/completions", STREAMED)).status in (502, 503)
    assert decode.requests == []


async def test_a_prefills_own_refusal_is_the_clients_answer() -> None:
    told = {"error": {"message": "too long", "type": "BadRequestError"}}
    decode = Engine()
    async with frontend(vllm(), prefill=[Engine(status(400, told))], decode=[decode]) as front:
        response = await front.post("/v1/completions", STREAMED)
        assert (response.status, json.loads(response.body)) == (400, told)
    assert decode.requests == []


async def test_a_prefill_that_hangs_ends_at_its_deadline() -> None:
    prefill, decode = Engine(hangs), Engine()
    limits = LimitsSpec(first_byte_timeout_s=0.2, request_timeout_s=10)
    async with frontend(vllm(limits=limits), prefill=[prefill], decode=[decode]) as front:
        response = await front.post("/v1/completions", STREAMED)
        assert (response.status, error_of(response)["type"]) == (504, "timeout")
        await prefill.wait(lambda: prefill.cancelled == 1)
        await front.idle()
    assert decode.requests == []


async def test_a_client_that_leaves_cancels_the_prefill() -> None:
    prefill, decode = Engine(hangs), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        asking = asyncio.create_task(front.post("/v1/completions", STREAMED))
        await prefill.wait(lambda: len(prefill.requests) == 1)
        asking.cancel()
        await prefill.wait(lambda: prefill.cancelled == 1)
    assert decode.requests == []


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_a_decode_that_fails_before_its_first_byte_starts_again_with_prefill(
    body: dict[str, Any],
) -> None:
    prefill = Engine(prefilled())
    decodes = [Engine(status(500)), Engine()]
    async with frontend(vllm(), prefill=[prefill], decode=decodes) as front:
        for _ in range(2):
            assert (await front.post("/v1/completions", body)).status == 200
    used = [body["kv_transfer_params"]["remote_request_id"] for d in decodes for body in d.bodies()]
    assert len(used) == len(set(used)) == len(prefill.requests) > 2


async def test_prefill_dying_between_the_legs_is_made_good_by_another_pair() -> None:
    """Decode answers 500 since it cannot pull; it is well itself, and the only one there is."""
    prefills = [Engine(prefilled()), Engine(prefilled(remote_host="h2"))]

    async def pulls(engine: Engine, request: Request, exchange: Exchange) -> None:
        if json.loads(request.body)["kv_transfer_params"]["remote_host"] == "h":
            exchange.respond(500, b'{"error": {"message": "Internal server error"}}')
        else:
            await answers(engine, request, exchange)

    decode = Engine(pulls)
    async with frontend(vllm(), prefill=prefills, decode=[decode]) as front:
        for _ in range(2):
            assert (await front.post("/v1/completions", STREAMED)).status == 200
    assert len(decode.requests) > 2


async def test_an_expired_handoff_is_not_used_and_prefill_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = catalog.contract("vllm")
    assert contract is not None
    real = type(contract).handoff
    expired: list[int] = []

    def late_once(self: Any, answer: dict[str, Any], now_s: float) -> Handoff:
        handoff = real(self, answer, now_s)
        if expired:
            return handoff
        expired.append(1)
        return Handoff(handoff.params, now_s - 1)

    monkeypatch.setattr(type(contract), "handoff", late_once)
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        assert (await front.post("/v1/completions", COMPLETION)).status == 200
        assert 'handoffs_refused_total{reason="expired"} 1.0' in await front.metrics()
    assert [body["kv_transfer_params"]["remote_request_id"] for body in decode.bodies()] == ["r2"]


async def test_no_decode_worker_is_503() -> None:
    prefill = Engine(prefilled())
    async with frontend(vllm(), prefill=[prefill]) as front:
        response = await front.call("GET", "/health")
        assert "decode: 0 of 1" in json.loads(response.body)["reasons"][0]
        response = await front.post("/v1/completions", COMPLETION)
        assert response.status == 503
        assert prefill.requests == []


MODES = ["kv", "least_loaded", "round_robin", "random", "power_of_two", "consistent_hash"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("condition", ["off", "isl", "load", "either"])
async def test_without_any_prefill_worker_decode_computes_prompts_in_every_mode(
    mode: str, condition: str
) -> None:
    router = RouterSpec(mode=mode, conditional_disagg=ConditionalDisaggSpec(mode=condition))
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(router=router), decode=[decode]) as front:
        for body in (COMPLETION, STREAMED):
            answer = await front.post("/v1/completions", body)
            assert (answer.status, dict(answer.headers)[b"x-dynctl-workers"]) == (200, b"decode-0")
        dry = await front.post("/v1/completions", COMPLETION, {"x-dynctl-dry-run": "1"})
        assert list(json.loads(dry.body)["roles"]) == ["decode"]
        named = await front.post("/v1/completions", COMPLETION, {"x-dynctl-prefill-worker": "prefill-0"})
        assert named.status == 503
        assert all("kv_transfer_params" not in body for body in decode.bodies())
        assert "router_prefill_skipped_total 2.0" in await front.metrics()
        await prefill.start()
        front.join("prefill", 0, prefill.url)
        await front.post("/v1/completions", COMPLETION, {"x-dynctl-prefill-worker": "prefill-0"})
        front.core.members_changed([], ["prefill-0"])
        assert (await front.post("/v1/completions", COMPLETION)).status == 200
    assert len(prefill.requests) == 1
    assert len(decode.requests) == 4
    await prefill.stop()


async def test_prompts_are_refused_without_prefill_workers_where_the_recipe_says_so() -> None:
    decode = Engine()
    async with frontend(vllm(router=RouterSpec(enforce_disagg=True)), decode=[decode]) as front:
        refused = await front.post("/v1/completions", COMPLETION)
        assert (refused.status, "role prefill" in error_of(refused)["message"]) == (503, True)
    async with frontend(sglang(), decode=[decode]) as front:  # whose decode takes nothing without prefill
        assert (await front.post("/v1/completions", COMPLETION)).status == 503
    assert decode.requests == []


@pytest.mark.parametrize("enforce", [False, True])
async def test_a_service_whose_prefill_workers_are_gone_is_healthy_while_decode_stands_in(
    enforce: bool,
) -> None:
    prefill, decode = Engine(prefilled()), Engine()

    async def health(front: Front) -> tuple[int, dict[str, Any]]:
        response = await front.call("GET", "/health")
        return response.status, json.loads(response.body)

    await prefill.start()
    async with frontend(vllm(router=RouterSpec(enforce_disagg=enforce)), decode=[decode]) as front:
        status_, told = await health(front)
        assert status_ == 503  # it has not come up yet
        assert "prefill: 0 of 1" in told["reasons"][0]
        front.join("prefill", 0, prefill.url)
        assert (await health(front))[0] == 200
        front.core.members_changed([], ["prefill-0"])
        status_, told = await health(front)
        assert status_ == (503 if enforce else 200)
        said = told["reasons" if enforce else "doubts"][0]
        assert said == "prefill: 0 of 1 ready" + ("" if enforce else ": decode workers compute prompts")
    await prefill.stop()


# --- both legs at once (SGLang)


def sglang(**fields: Any) -> FrontendSpec:
    return make_spec(backend="sglang", roles={"prefill": 1, "decode": 1}, **fields)


class Pair:
    """A prefill and a decode engine; decode answers once prefill has been asked for the same room."""

    def __init__(self, prefill: Script = answers, decode: Script | None = None) -> None:
        self.prefill = Engine(prefill)
        self.decode = Engine(decode or self._meets)

    async def _meets(self, engine: Engine, request: Request, exchange: Exchange) -> None:
        room = json.loads(request.body)["bootstrap_room"]
        await self.prefill.wait(lambda: any(b["bootstrap_room"] == room for b in self.prefill.bodies()))
        await answers(engine, request, exchange)


@pytest.mark.parametrize("body", [COMPLETION, STREAMED])
async def test_concurrent_legs_carry_the_same_room(body: dict[str, Any]) -> None:
    pair = Pair()
    async with frontend(sglang(), decode=[pair.decode]) as front:
        await pair.prefill.start()
        front.join("prefill", 0, pair.prefill.url, bootstrap_port=8998, dp_size=2)
        for _ in range(4):
            assert (await front.post("/v1/completions", body)).status == 200
        await pair.prefill.stop()
    rooms = set()
    for request, asked in zip(pair.prefill.requests, pair.prefill.bodies(), strict=True):
        assert asked["bootstrap_port"] == 8998
        assert asked["bootstrap_room"] % 2 == int(request.header(b"x-data-parallel-rank") or b"9")
        rooms.add(asked["bootstrap_room"])
    assert rooms == {asked["bootstrap_room"] for asked in pair.decode.bodies()}
    assert len(rooms) == 4


async def concurrent_call(pair: Pair, body: dict[str, Any], **fields: Any) -> tuple[int, bytes]:
    async with frontend(sglang(**fields), decode=[pair.decode]) as front:
        await pair.prefill.start()
        front.join("prefill", 0, pair.prefill.url, bootstrap_port=8998)
        response = await front.post("/v1/completions", body)
        await front.idle()
        await pair.prefill.stop()
    return response.status, response.body


def legs(engine: Engine) -> list[Any]:
    """What an engine was asked, without calls to end a request."""
    return [request for request in engine.requests if request.path == "/v1/completions"]


async def test_a_failed_prefill_leg_cancels_decode() -> None:
    pair = Pair(prefill=status(500), decode=hangs)
    code, _ = await concurrent_call(pair, STREAMED)
    assert code == 502
    await pair.decode.wait(lambda: pair.decode.cancelled >= len(legs(pair.decode)) >= 1)


async def test_a_failed_decode_leg_cancels_prefill() -> None:
    pair = Pair(prefill=hangs, decode=status(500))
    code, _ = await concurrent_call(pair, COMPLETION)
    assert code == 502
    await pair.prefill.wait(lambda: pair.prefill.cancelled >= len(legs(pair.prefill)) >= 1)


async def test_a_refusal_of_either_leg_is_the_clients_answer() -> None:
    told = {"error": {"message": "bad"}}
    code, body = await concurrent_call(Pair(prefill=status(400, told), decode=hangs), STREAMED)
    assert (code, json.loads(body)) == (400, told)
    code, body = await concurrent_call(Pair(prefill=hangs, decode=status(400, told)), COMPLETION)
    assert (code, json.loads(body)) == (400, told)


async def test_both_legs_hanging_end_at_the_deadline() -> None:
    limits = LimitsSpec(first_byte_timeout_s=0.2, request_timeout_s=10)
    code, _ = await concurrent_call(Pair(prefill=hangs, decode=hangs), STREAMED, limits=limits)
    assert code == 504


async def test_a_client_that_leaves_cancels_both_legs() -> None:
    pair = Pair(prefill=hangs, decode=hangs)
    async with frontend(sglang(), decode=[pair.decode]) as front:
        await pair.prefill.start()
        front.join("prefill", 0, pair.prefill.url, bootstrap_port=8998)
        asking = asyncio.create_task(front.post("/v1/completions", STREAMED))
        await pair.prefill.wait(lambda: len(pair.prefill.requests) == 1)
        await pair.decode.wait(lambda: len(pair.decode.requests) == 1)
        asking.cancel()
        await pair.prefill.wait(lambda: pair.prefill.cancelled == 1)
        await pair.decode.wait(lambda: pair.decode.cancelled == 1)
        await pair.prefill.stop()


# --- a prefill whose answer is already the whole one (TensorRT-LLM)


@pytest.mark.parametrize("usage", [False, True])
async def test_a_request_finished_by_prefill_is_answered_in_the_form_asked_for(usage: bool) -> None:
    spec = make_spec(backend="trtllm", roles={"prefill": 1, "decode": 1})
    decode = Engine()
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    async with frontend(spec, prefill=[Engine()], decode=[decode]) as front:
        whole = await front.post("/v1/chat/completions", chat)
        assert json.loads(whole.body)["choices"][0]["message"]["content"] == "abc"
        options = {"stream": True, "stream_options": {"include_usage": usage}}
        streamed = await front.post("/v1/chat/completions", {**chat, **options})
    events = streamed.body.decode().strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["content"] == "abc"
    assert len(events) == (3 if usage else 2)
    assert decode.requests == []


async def test_retries_of_prefill_and_decode_are_bounded_together() -> None:
    prefill, decode = Engine(prefilled()), Engine(in_turn(status(500)))
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        assert (await front.post("/v1/completions", STREAMED)).status == 502
    assert len(prefill.requests) == len(decode.requests) == MAX_ATTEMPTS
