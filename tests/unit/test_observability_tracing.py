from __future__ import annotations

import json
import re
from random import Random

import pytest

from dynctl.observability.otlp import encode
from dynctl.observability.tracing import UNRECORDED, SpanData, Trace, Tracing

TRACE = b"0af7651916cd43dd8448eb211c80319c"
PARENT = b"b7ad6b7169203331"
GIVEN = b"00-" + TRACE + b"-" + PARENT + b"-01"


def begin(*headers: tuple[bytes, bytes], record: list[SpanData] | None = None, ratio: float = 1.0) -> Trace:
    return Tracing(Random(1), record.append if record is not None else None, ratio).of(headers)


def sent(trace: Trace) -> dict[bytes, bytes]:
    return dict(trace.headers(trace.span("decode", "client")))


def test_a_valid_trace_goes_on_with_a_span_id_of_its_own_for_each_hop() -> None:
    trace = begin((b"traceparent", GIVEN), (b"tracestate", b"a=1"), (b"tracestate", b"b=2"))
    first, second = sent(trace), sent(trace)
    for headers in (first, second):
        assert re.fullmatch(b"00-" + TRACE + b"-[0-9a-f]{16}-01", headers[b"traceparent"])
        assert PARENT not in headers[b"traceparent"]
        assert headers[b"tracestate"] == b"a=1,b=2"
    assert first[b"traceparent"] != second[b"traceparent"]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"00-1",
        GIVEN.upper(),
        GIVEN + b"-more",
        GIVEN[:-1],
        b"ff" + GIVEN[2:],
        b"00-" + b"0" * 32 + b"-" + PARENT + b"-01",
        b"00-" + TRACE + b"-" + b"0" * 16 + b"-01",
        GIVEN + b"\nx",
    ],
)
def test_a_malformed_trace_is_replaced_and_its_state_dropped(value: bytes) -> None:
    headers = sent(begin((b"traceparent", value), (b"tracestate", b"a=1")))
    assert re.fullmatch(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-01", headers[b"traceparent"])
    assert TRACE not in headers[b"traceparent"].lower()
    assert b"tracestate" not in headers


def test_two_parents_are_as_good_as_none() -> None:
    assert begin((b"traceparent", GIVEN), (b"traceparent", GIVEN)).id != TRACE


def test_later_versions_are_read_as_far_as_known_and_unknown_flags_dropped() -> None:
    trace = begin((b"traceparent", b"cc" + GIVEN[2:-2] + b"ff-what-ever"))
    assert trace.id == TRACE
    assert sent(trace)[b"traceparent"].startswith(b"00-")
    assert sent(trace)[b"traceparent"].endswith(b"-03")


def test_a_state_that_is_too_long_or_not_ascii_is_not_passed_on() -> None:
    for state in (b"a=" + b"x" * 5000, b"a=\xff", b"a=\x00"):
        assert b"tracestate" not in sent(begin((b"traceparent", GIVEN), (b"tracestate", state)))


def test_without_a_collector_nothing_is_recorded() -> None:
    trace = begin()
    assert trace.root is UNRECORDED
    assert trace.span("route") is UNRECORDED
    with trace.span("route") as span:
        span.set("a", 1)


def test_spans_are_below_the_request_and_the_request_below_the_client() -> None:
    told: list[SpanData] = []
    trace = begin((b"traceparent", GIVEN), record=told)
    with trace.root:
        span = trace.span("route")
        span.set("worker", "w-0")
        span.__exit__(ValueError, ValueError("no"), None)
        trace.span("never ended")
    route, root = told
    assert (root.name, root.parent, root.kind) == ("request", PARENT.decode(), "server")
    assert (route.parent, route.trace) == (root.id, TRACE.decode())
    assert route.error == "ValueError: no"
    assert root.start_ns <= route.start_ns <= route.end_ns <= root.end_ns


def test_the_header_of_a_recorded_hop_names_its_span() -> None:
    told: list[SpanData] = []
    trace = begin(record=told)
    span = trace.span("decode", "client")
    headers = dict(trace.headers(span))
    span.end()
    span.end()
    assert told[0].id.encode() in headers[b"traceparent"]
    assert len(told) == 1


def test_the_client_decides_what_of_its_own_is_sampled_and_the_ratio_what_of_ours() -> None:
    told: list[SpanData] = []
    not_sampled = begin((b"traceparent", GIVEN[:-1] + b"0"), record=told)
    assert not_sampled.root is UNRECORDED
    assert sent(not_sampled)[b"traceparent"].endswith(b"-00")
    assert sent(begin(record=told, ratio=0.0))[b"traceparent"].endswith(b"-00")
    assert begin((b"traceparent", GIVEN), record=told, ratio=0.0).root is not UNRECORDED
    tracing = Tracing(Random(2), told.append, 0.25)
    assert 150 < sum(tracing.of(()).root is not UNRECORDED for _ in range(1000)) < 350


def test_otlp_is_in_the_json_encoding_of_the_specification() -> None:
    span = SpanData(
        "0" * 31 + "1", "0" * 15 + "2", "", "decode", "client", 1, 2**60, {"s": "a", "n": 3, "f": 0.5}
    )
    failed = SpanData("0" * 31 + "1", "0" * 15 + "3", "0" * 15 + "2", "x", "internal", 1, 2, {}, "E: no")
    body = json.loads(encode([span, failed], {"service.name": "dynctl"}))
    resource = body["resourceSpans"][0]
    assert resource["resource"]["attributes"] == [{"key": "service.name", "value": {"stringValue": "dynctl"}}]
    first, second = resource["scopeSpans"][0]["spans"]
    assert first == {
        "traceId": "0" * 31 + "1",
        "spanId": "0" * 15 + "2",
        "name": "decode",
        "kind": 3,
        "startTimeUnixNano": "1",
        "endTimeUnixNano": str(2**60),
        "attributes": [
            {"key": "s", "value": {"stringValue": "a"}},
            {"key": "n", "value": {"intValue": "3"}},
            {"key": "f", "value": {"doubleValue": 0.5}},
        ],
    }
    assert second["parentSpanId"] == "0" * 15 + "2"
    assert second["status"] == {"code": 2, "message": "E: no"}
