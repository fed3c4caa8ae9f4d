"""Spans as an OTLP/HTTP JSON request (`POST /v1/traces`), which every OpenTelemetry collector takes.

Source: opentelemetry-proto, trace/v1, in the JSON encoding of its specification: ids in hexadecimal, 64-bit
numbers as strings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from dynctl.observability.tracing import SpanData, Value

PATH: Final = "/v1/traces"
_KINDS: Final = {"internal": 1, "server": 2, "client": 3}
_STATUS_ERROR: Final = 2


def encode(spans: Sequence[SpanData], resource: Mapping[str, Value]) -> bytes:
    """The request's body. `resource` says which process the spans are of."""
    scope = {"scope": {"name": "dynctl"}, "spans": [_span(span) for span in spans]}
    body = {"resourceSpans": [{"resource": {"attributes": _attributes(resource)}, "scopeSpans": [scope]}]}
    return msgspec.json.encode(body)


def _span(span: SpanData) -> dict[str, Any]:
    told: dict[str, Any] = {
        "traceId": span.trace,
        "spanId": span.id,
        "name": span.name,
        "kind": _KINDS[span.kind],
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
    }
    if span.parent:
        told["parentSpanId"] = span.parent
    if span.error:
        told["status"] = {"code": _STATUS_ERROR, "message": span.error}
    return told


def _attributes(values: Mapping[str, Value]) -> list[dict[str, Any]]:
    return [{"key": name, "value": _value(value)} for name, value in values.items()]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, str):
        return {"stringValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value}
