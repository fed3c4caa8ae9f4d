"""What clients see of a frontend: routes, statuses, bodies relayed as they are."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import openai
import pytest

from dynctl.http.server import Exchange, Request
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import ApiKeySpec, LimitsSpec
from tests.integration.frontend_harness import (
    Engine,
    chat_token,
    error_of,
    frontend,
    make_spec,
    sse,
    status,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


async def test_the_body_reaches_the_engine_byte_for_byte() -> None:
    engine = Engine()
    data = b'{ "model":"m", "prompt" : "h\\u00e9", "temperature": 1.50, "x_unknown": {"a" : [ 1 ]} }'
    async with frontend(make_spec(), aggregated=[engine]) as front:
        response = await front.post("/v1/completions", data)
    assert response.status == 200
    assert engine.requests[0].body == data
    assert json.loads(response.body)["choices"][0]["text"] == "abc"


async def test_a_stream_is_relayed_byte_for_byte() -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        pieces = [piece async for piece in front.pieces("/v1/chat/completions", {**CHAT, "stream": True})]
    assert b"".join(pieces) == b"".join(sse(chat_token("a"), chat_token("b"), chat_token("c", "stop")))


async def test_the_openai_client_streams_and_does_not() -> None:
    async with (
        frontend(make_spec(), aggregated=[Engine()]) as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        whole = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
        assert whole.choices[0].message.content == "abc"
        stream = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "abc"
        assert [model.id async for model in client.models.list()] == ["m"]
        assert (await client.models.retrieve("m")).owned_by == "dynctl"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="other", prompt="x")
        assert caught.value.code == "model_not_found"


async def test_fields_only_dynctl_may_set_never_reach_an_engine() -> None:
    engine = Engine()
    secret = {"kv_transfer_params": {"do_remote_prefill": True}}
    async with frontend(make_spec(), aggregated=[engine]) as front:
        for path, body in (("/v1/completions", COMPLETION), ("/v1/responses", {"model": "m", "input": "x"})):
            assert (await front.post(path, {**body, **secret})).status == 200
        escaped = b'{"model":"m","prompt":"x","kv\\u005ftransfer_params":{}}'
        assert (await front.post("/v1/completions", escaped)).status == 200
    assert engine.bodies() == [COMPLETION, {"model": "m", "input": "x"}, {"model": "m", "prompt": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b"{", None),
        ("/v1/completions", b"[1]", None),
        ("/v1/completions", b'{"prompt": "x"}', "model"),
        ("/v1/completions", b'{"model": 5, "prompt": "x"}', "model"),
        ("/v1/completions", b'{"model": "m"}', "prompt"),
        ("/v1/completions", b'{"model": "m", "prompt": {}}', "prompt"),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "stream": "yes"}', "stream"),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "max_tokens": "9"}', "max_tokens"),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "max_tokens": -1}', "max_tokens"),
        ("/v1/completions", b'{"model": "m", "prompt": "x", "n": "2"}', "n"),
        ("/v1/chat/completions", b'{"model": "m"}', "messages"),
        ("/v1/chat/completions", b'{"model": "m", "messages": []}', "messages"),
        ("/v1/chat/completions", b'{"model": "m", "messages": [{"role": 1}]}', "messages[0].role"),
        ("/v1/chat/completions", b'{"model": "m", "messages": "x"}', "messages"),
        ("/v1/embeddings", b"nonsense", None),
    ],
)
async def test_bad_bodies_are_400_and_touch_no_worker(path: str, body: bytes, param: str | None) -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        response = await front.post(path, body)
        assert response.status == 400
        error = error_of(response)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"]
    assert engine.requests == []


async def test_unknown_model_path_and_method() -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        response = await front.post("/v1/completions", {**COMPLETION, "model": "gpt-9"})
        assert (response.status, error_of(response)["code"]) == (404, "model_not_found")
        assert "gpt-9" in error_of(response)["message"]
        response = await front.call("GET", "/v1/models/gpt-9")
        assert (response.status, error_of(response)["code"]) == (404, "model_not_found")
        response = await front.post("/v1/nothing", {})
        assert (response.status, error_of(response)["code"]) == (404, "unknown_path")
        response = await front.call("GET", "/v1/completions")
        assert (response.status, error_of(response)["code"]) == (405, "method_not_allowed")
        response = await front.post("/health", {})
        assert response.status == 405


async def test_a_model_id_with_a_slash_is_found_by_clients_that_escape_it() -> None:
    async with (
        frontend(make_spec(model=ModelCard(name="org/m")), aggregated=[Engine()]) as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        assert (await client.models.retrieve("org/m")).id == "org/m"
        assert (await front.call("GET", "/v1/models/org/m")).status == 200


async def test_engine_administration_cannot_be_reached() -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        for path in ("/v1/load_lora_adapter", "/abort_requests", "/flush_cache", "/pause", "/server_info"):
            assert (await front.post(path, {"model": "m"})).status == 404
    assert engine.requests == []


async def test_a_body_over_the_limit_is_413_and_touches_no_worker() -> None:
    engine = Engine()
    spec = make_spec(limits=LimitsSpec(body_bytes=1000, header_bytes=2000))
    async with frontend(spec, aggregated=[engine]) as front:
        response = await front.post("/v1/completions", {**COMPLETION, "prompt": "x" * 2000})
        assert response.status == 413
        response = await front.post("/v1/completions", COMPLETION, {"x-long": "y" * 3000})
        assert response.status == 431
    assert engine.requests == []


async def test_other_paths_pass_through_to_a_worker() -> None:
    engine = Engine(status(200, {"ok": True}))
    async with frontend(make_spec(), aggregated=[engine]) as front:
        for path in ("/v1/embeddings", "/tokenize", "/detokenize", "/v1/rerank", "/v1/score", "/v1/messages"):
            response = await front.post(path, {"model": "m", "input": "x"})
            assert (response.status, json.loads(response.body)) == (200, {"ok": True})
        assert (await front.post("/tokenize", {"prompt": "x"})).status == 200
        assert (await front.post("/tokenize", {"model": "q", "prompt": "x"})).status == 404
    assert [request.path for request in engine.requests][:2] == ["/v1/embeddings", "/tokenize"]


async def test_an_engines_own_refusal_is_passed_on() -> None:
    told = {"error": {"message": "temperature must be positive", "type": "BadRequestError", "code": 400}}
    for body in (COMPLETION, {**COMPLETION, "stream": True}):
        engine = Engine(status(400, told))
        async with frontend(make_spec(), aggregated=[engine, Engine()]) as front:
            response = await front.post("/v1/completions", body)
            assert (response.status, json.loads(response.body)) == (400, told)
            assert 'error_type="validation"' in await front.metrics()
        assert len(engine.requests) == 1


async def test_request_ids_go_both_ways() -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        response = await front.post("/v1/completions", COMPLETION, {"x-request-id": "abc-1"})
        assert dict(response.headers)[b"x-request-id"] == b"abc-1"
        assert engine.requests[0].header(b"x-request-id") == b"abc-1"
        response = await front.post("/v1/completions", COMPLETION, {"x-request-id": "bad id"})
        made = dict(response.headers)[b"x-request-id"]
        assert made == engine.requests[1].header(b"x-request-id")
        assert b" " not in made
        response = await front.post("/v1/completions", b"{", {"x-request-id": "abc-2"})
        assert dict(response.headers)[b"x-request-id"] == b"abc-2"


async def test_only_known_headers_reach_the_engine() -> None:
    engine = Engine()
    sent = {
        "x-data-parallel-rank": "3",
        "x-override-rid": "r",
        "authorization": "Bearer e",
        "cookie": "c",
    }
    async with frontend(make_spec(), aggregated=[engine]) as front:
        await front.post("/v1/completions", COMPLETION, sent)
    request = engine.requests[0]
    assert request.header(b"authorization") == b"Bearer e"
    assert request.header(b"content-type") == b"application/json"
    for name in (b"x-data-parallel-rank", b"x-override-rid", b"cookie"):
        assert request.header(name) is None


async def test_api_keys_guard_v1_and_stay_out_of_engines() -> None:
    engine = Engine()
    spec = make_spec(api_keys=[ApiKeySpec(name="k", sha256=hashlib.sha256(b"right").hexdigest())])
    async with frontend(spec, aggregated=[engine]) as front:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize")):
                response = await front.call(method, path, COMPLETION if method == "POST" else None, headers)
                assert (response.status, error_of(response)["code"]) == (401, "invalid_api_key")
        for path in ("/live", "/health", "/metrics"):
            assert (await front.call("GET", path)).status == 200
        response = await front.post("/v1/completions", COMPLETION, {"authorization": "Bearer right"})
        assert response.status == 200
    assert len(engine.requests) == 1
    assert engine.requests[0].header(b"authorization") is None


async def test_health_is_503_with_a_reason_until_each_role_has_a_worker() -> None:
    engine = Engine()
    async with frontend(make_spec(roles={"aggregated": 2})) as front:
        assert (await front.call("GET", "/live")).status == 200
        response = await front.call("GET", "/health")
        told = json.loads(response.body)
        assert (response.status, told["status"]) == (503, "not_ready")
        assert "aggregated: 0 of 2" in told["reasons"][0]
        assert told["roles"] == {"aggregated": {"ready": 0, "wanted": 2}}
        refused = await front.post("/v1/completions", COMPLETION)
        assert (refused.status, error_of(refused)["type"]) == (503, "service_unavailable")
        assert dict(refused.headers)[b"retry-after"] == b"1"
        await engine.start()
        front.join("aggregated", 0, engine.url)
        response = await front.call("GET", "/health")
        assert (response.status, json.loads(response.body)["status"]) == (200, "ready")
        front.join("aggregated", 0, engine.url, state="draining")
        assert (await front.call("GET", "/health")).status == 503
        front.core.members_changed([], ["aggregated-0"])
        assert (await front.post("/v1/completions", COMPLETION)).status == 503
        await engine.stop()


async def test_models_show_context_length_and_adapters_of_the_workers() -> None:
    engine = Engine()
    async with frontend(make_spec()) as front:
        await engine.start()
        card = ModelCard(name="m", max_model_len=4096, adapters=["tuned"])
        front.join("aggregated", 0, engine.url, model=card)
        data = json.loads((await front.call("GET", "/v1/models")).body)["data"]
        assert [(one["id"], one["max_model_len"], one.get("parent")) for one in data] == [
            ("m", 4096, None),
            ("tuned", 4096, "m"),
        ]
        assert (await front.post("/v1/completions", {**COMPLETION, "model": "tuned"})).status == 200
        await engine.stop()


async def test_data_parallel_rank_goes_as_a_header() -> None:
    engine = Engine()
    async with frontend(make_spec()) as front:
        await engine.start()
        front.join("aggregated", 0, engine.url, dp_size=2)
        for _ in range(2):
            await front.post("/v1/completions", COMPLETION)
        await engine.stop()
    assert sorted(request.header(b"x-data-parallel-rank") or b"" for request in engine.requests) == [
        b"0",
        b"1",
    ]


async def test_http_1_0_clients_get_the_payload_alone() -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.server.port)
        body = json.dumps({**COMPLETION, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
    head, _, payload = answer.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert payload.startswith(b"data: {")
    assert payload.endswith(b"data: [DONE]\n\n")


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.server.port)
        writer.write(b"GET /live HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = b""
        while b'"list"' not in answer:
            answer += await asyncio.wait_for(reader.read(65536), 10)
        writer.close()
        await writer.wait_closed()
    assert answer.index(b'"live"') < answer.index(b'"list"')


async def test_metrics_count_what_happened() -> None:
    async def with_usage(engine: Engine, request: Request, exchange: Exchange) -> None:
        events: list[Any] = [chat_token(text) for text in "abcd"]
        events.append({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 42}})
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in sse(*events):
            exchange.write(event)
            await asyncio.sleep(0)
        exchange.end()

    async with frontend(make_spec(), aggregated=[Engine(with_usage)]) as front:
        async for _ in front.pieces("/v1/chat/completions", {**CHAT, "stream": True}):
            pass
        text = await front.metrics()
    labels = 'endpoint="chat_completions",error_type="",model="m",request_type="stream",status="success"'
    assert f"dynctl_frontend_requests_total{{{labels}}} 1.0" in text
    assert 'dynctl_frontend_inflight_requests{model="m"} 0.0' in text
    assert 'dynctl_frontend_output_tokens_total{model="m"} 42.0' in text
    assert 'dynctl_frontend_time_to_first_token_seconds_count{model="m"} 1.0' in text
    assert 'dynctl_frontend_router_workers{role="aggregated"} 1.0' in text


async def test_refusals_before_a_request_is_one_are_counted() -> None:
    engine = Engine()
    keys = [ApiKeySpec(name="k", sha256=hashlib.sha256(b"k").hexdigest())]
    async with frontend(make_spec(api_keys=keys), aggregated=[engine]) as front:
        key = {"authorization": "Bearer k"}
        await front.post("/v1/completions", COMPLETION)
        await front.post("/v1/completions", b"{", key)
        await front.post("/v1/completions", {"model": "made-up-by-a-client", "prompt": "x"}, key)
        await front.call("GET", "/nothing-is-here")
        text = await front.metrics()
    labels = 'endpoint="completions",error_type="{}",model="",request_type="unary",status="error"'
    for error_type in ("unauthorized", "validation", "not_found"):
        assert f"requests_total{{{labels.format(error_type)}}} 1.0" in text
    assert 'endpoint="",error_type="not_found"' in text
    assert "made-up" not in text
    assert "nothing-is-here" not in text


async def test_a_wrong_method_is_told_the_right_ones() -> None:
    async with frontend(make_spec()) as front:
        for method, path, allowed in (
            ("GET", "/v1/completions", b"POST"),
            ("DELETE", "/v1/models", b"GET, HEAD"),
            ("POST", "/health", b"GET, HEAD"),
        ):
            response = await front.call(method, path)
            assert response.status == 405
            assert dict(response.headers)[b"allow"] == allowed


async def test_metrics_of_workers_and_model_are_shown_and_go_with_the_worker() -> None:
    engine = Engine()
    async with frontend(make_spec(metrics_prefix="dynamo"), aggregated=[engine]) as front:
        await front.post("/v1/completions", {**COMPLETION, "stream": True})
        text = await front.metrics()
        labels = '{dp_rank="0",worker_id="aggregated-0",worker_type="aggregated"}'
        assert f"dynamo_frontend_worker_active_decode_blocks{labels} 0.0" in text
        assert f"dynamo_frontend_worker_last_time_to_first_token_seconds{labels} 0.0" in text
        assert 'dynamo_component_router_requests_total{router_id="frontend-0"} 1.0' in text
        assert 'dynamo_router_overhead_scheduling_ms_count{router_id="frontend-0"} 1.0' in text
        assert 'dynamo_frontend_stage_duration_seconds_count{stage="dispatch"} 1.0' in text
        assert 'dynamo_frontend_queued_requests{model="m"} 0.0' in text
        assert "dynctl_" not in text
        front.core.members_changed([], ["aggregated-0"])
        assert 'worker_id="aggregated-0"' not in await front.metrics()
