"""Traces through the frontend: what engines are told, and what a collector gets."""

from __future__ import annotations

import re
from typing import Any

from dynctl.protocol.specs import TracingSpec
from tests.integration.frontend_harness import Engine, frontend, make_spec, status
from tests.integration.test_frontend_disagg import prefilled, vllm
from tests.integration.test_frontend_migration import COMPLETION as STREAMED
from tests.integration.test_frontend_migration import says

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 3}
TRACE = "0af7651916cd43dd8448eb211c80319c"
GIVEN = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "tracestate": "v=1"}


def parent(engine: Engine, index: int = 0) -> str:
    return (engine.requests[index].header(b"traceparent") or b"").decode()


class Collector(Engine):
    """Takes OTLP and keeps the spans, by name."""

    def spans(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for body in self.bodies():
            for span in body["resourceSpans"][0]["scopeSpans"][0]["spans"]:
                found.setdefault(span["name"], []).append(span)
        return found


async def test_both_legs_belong_to_the_clients_trace_each_with_its_own_span() -> None:
    prefill, decode = Engine(prefilled()), Engine()
    async with frontend(vllm(), prefill=[prefill], decode=[decode]) as front:
        await front.post("/v1/completions", COMPLETION, GIVEN)
    seen = [parent(prefill), parent(decode)]
    assert len({*seen, GIVEN["traceparent"]}) == 3
    assert all(re.fullmatch(f"00-{TRACE}-[0-9a-f]{{16}}-01", one) for one in seen)
    assert decode.requests[0].header(b"tracestate") == b"v=1"


async def test_a_trace_begins_here_when_the_client_has_none() -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        await front.post("/v1/completions", COMPLETION)
        await front.post("/v1/completions", COMPLETION, {"traceparent": "00-nonsense", "tracestate": "v=1"})
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", parent(engine, i)) for i in (0, 1))
    assert parent(engine, 0) != parent(engine, 1)
    assert engine.requests[1].header(b"tracestate") is None


async def test_a_collector_gets_the_spans_of_a_request_and_of_a_failed_one() -> None:
    collector = Collector()
    await collector.start()
    prefill, decode = Engine(prefilled()), Engine()
    try:
        spec = vllm(tracing=TracingSpec(otlp_endpoint=collector.url))
        async with frontend(spec, prefill=[prefill], decode=[decode]) as front:
            await front.post("/v1/completions", COMPLETION, GIVEN)
            prefill.script = status(500)
            await front.post("/v1/completions", COMPLETION)
            await collector.wait(lambda: len(collector.spans().get("request", [])) == 2)
            assert "trace_spans_total" in await front.metrics()
    finally:
        await collector.stop()
    spans = collector.spans()
    request = spans["request"][0]
    assert (request["traceId"], request["parentSpanId"], request["kind"]) == (TRACE, "b7ad6b7169203331", 2)
    assert {"key": "url.path", "value": {"stringValue": "/v1/completions"}} in request["attributes"]
    for name in ("preprocess", "route", "prefill", "decode"):
        assert spans[name][0]["parentSpanId"] == request["spanId"], name
    assert parent(decode) == f"00-{TRACE}-{spans['decode'][0]['spanId']}-01"
    assert {"key": "dynctl.worker", "value": {"stringValue": "decode-0"}} in spans["decode"][0]["attributes"]
    assert "status" not in request
    assert "EngineFailed" in spans["request"][1]["status"]["message"]


async def test_a_collector_that_is_gone_costs_no_request_anything() -> None:
    collector, engine = Engine(), Engine()
    await collector.start()
    url = collector.url
    await collector.stop()
    spec = make_spec(tracing=TracingSpec(otlp_endpoint=url))
    async with frontend(spec, aggregated=[engine]) as front:
        for _ in range(3):
            assert (await front.post("/v1/completions", COMPLETION)).status == 200
        metrics = front.core.metrics
    assert metrics.counter("trace_spans_total", outcome="dropped").value >= 9


async def test_every_answer_carries_the_request_id_also_pages_and_errors() -> None:
    engine = Engine()
    async with frontend(make_spec(), aggregated=[engine]) as front:
        for method, path, body in (
            ("POST", "/v1/completions", COMPLETION),
            ("POST", "/v1/completions", {**COMPLETION, "stream": True}),
            ("POST", "/v1/completions", {"model": "other", "prompt": "x"}),
            ("POST", "/v1/completions", b"{"),
            ("GET", "/v1/completions", None),
            ("GET", "/nothing", None),
            ("GET", "/health", None),
            ("GET", "/metrics", None),
            ("GET", "/v1/models", None),
        ):
            response = await front.call(method, path, body, {"x-request-id": "mine"})
            assert [v for k, v in response.headers if k == b"x-request-id"] == [b"mine"], (path, body)


async def test_a_stream_that_moves_on_says_so_in_the_same_trace() -> None:
    collector = Collector()
    await collector.start()
    first, second = Engine(says(4)), Engine(says())
    try:
        spec = make_spec(tracing=TracingSpec(otlp_endpoint=collector.url))
        async with frontend(spec, aggregated=[first, second]) as front:
            await front.post("/v1/completions", STREAMED)
            await collector.wait(lambda: "request" in collector.spans())
    finally:
        await collector.stop()
    spans = collector.spans()
    (migration,) = spans["migration"]
    assert migration["parentSpanId"] == spans["request"][0]["spanId"]
    failed, ended = spans["aggregated"]
    assert "status" in failed
    assert "status" not in ended
    assert parent(first)[:36] == parent(second)[:36] == f"00-{migration['traceId']}-"
