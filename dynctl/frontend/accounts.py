"""What one request adds to the metrics: series bound once per model, endpoint and type, then added to."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dynctl.observability.metrics import Counter, Gauge, Histogram, Metrics


@dataclass(frozen=True, slots=True)
class _Series:
    started: Counter
    inflight: Gauge
    duration: Histogram
    ttft: Histogram
    itl: Histogram
    input_tokens: Histogram
    output_tokens: Histogram
    output_total: Counter


class Account:
    """One request, from its start to `close`. Times are of the monotonic clock, in seconds."""

    __slots__ = ("_accounts", "_labels", "_series", "itl", "output_tokens", "started_s", "ttft")

    def __init__(self, accounts: Accounts, series: _Series, labels: tuple[str, str, str]) -> None:
        self._accounts = accounts
        self._series = series
        self._labels = labels
        self.ttft = series.ttft
        self.itl = series.itl
        self.output_tokens = 0
        self.started_s = time.monotonic()
        series.started.inc()
        series.inflight.inc()

    def prompt(self, tokens: int) -> None:
        """The prompt's length, when it is known (not 0)."""
        if tokens:
            self._series.input_tokens.observe(tokens)

    def close(self, error_type: str = "") -> None:
        """The request has ended; `error_type` is "" for a success."""
        series = self._series
        series.inflight.dec()
        series.duration.observe(time.monotonic() - self.started_s)
        if self.output_tokens:
            series.output_tokens.observe(self.output_tokens)
            series.output_total.inc(self.output_tokens)
        self._accounts.ended(self._labels, error_type)


class Accounts:
    """Opens accounts. `model` must be a name that is served, never what a client made up."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._bound: dict[tuple[str, str, str], _Series] = {}
        self._ended: dict[tuple[str, str, str, str], Counter] = {}

    def open(self, model: str, endpoint: str, *, stream: bool) -> Account:
        """Begin a request."""
        labels = (model, endpoint, "stream" if stream else "unary")
        series = self._bound.get(labels)
        if series is None:
            series = self._bound[labels] = self._bind(*labels)
        return Account(self, series, labels)

    def ended(self, labels: tuple[str, str, str], error_type: str) -> None:
        """Count an ended request by how it ended."""
        key = (*labels, error_type)
        counter = self._ended.get(key)
        if counter is None:
            model, endpoint, request_type = labels
            counter = self._ended[key] = self._metrics.counter(
                "requests_total",
                model=model,
                endpoint=endpoint,
                request_type=request_type,
                status="error" if error_type else "success",
                error_type=error_type,
            )
        counter.inc()
        if error_type == "cancelled":
            model, endpoint, request_type = labels
            self._metrics.counter(
                "model_cancellation_total", model=model, endpoint=endpoint, request_type=request_type
            ).inc()
            self._metrics.gauge("disconnected_clients").inc()
        elif error_type in ("unavailable", "overload"):
            self._metrics.counter("model_rejection_total", model=labels[0], endpoint=labels[1]).inc()

    def _bind(self, model: str, endpoint: str, request_type: str) -> _Series:
        metrics = self._metrics
        return _Series(
            started=metrics.counter(
                "requests_started_total", model=model, endpoint=endpoint, request_type=request_type
            ),
            inflight=metrics.gauge("inflight_requests", model=model),
            duration=metrics.histogram("request_duration_seconds", model=model),
            ttft=metrics.histogram("time_to_first_token_seconds", model=model),
            itl=metrics.histogram("inter_token_latency_seconds", model=model),
            input_tokens=metrics.histogram("input_sequence_tokens", model=model),
            output_tokens=metrics.histogram("output_sequence_tokens", model=model),
            output_total=metrics.counter("output_tokens_total", model=model),
        )
