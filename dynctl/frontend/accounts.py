"""What one request adds to the metrics: series bound once per model, endpoint and type, then added to."""

from __future__ import annotations

import time
from dataclasses import dataclass

from dynctl.observability.metrics import Counter, Gauge, Histogram, Metrics


@dataclass(frozen=True, slots=True)
class _Series:
    started: Counter
    active: Gauge
    inflight: Gauge
    queued: Gauge
    duration: Histogram
    ttft: Histogram
    itl: Histogram
    tpot: Histogram
    input_tokens: Histogram
    output_tokens: Histogram
    output_total: Counter
    cached_tokens: Histogram
    embedding: Histogram | None


@dataclass(frozen=True, slots=True)
class _Routed:
    """What all requests add to the router's own series."""

    ttft: Histogram
    itl: Histogram
    input_tokens: Histogram
    output_tokens: Histogram
    reused_tokens: Counter
    transfer: Histogram


@dataclass(frozen=True, slots=True)
class _Worker:
    """The last request of one worker's rank."""

    ttft: Gauge
    input_tokens: Gauge
    itl: Gauge


class Account:
    """One request, from its start to `close`. Times are of the monotonic clock, in seconds.

    `cached_tokens`: prompt tokens the engine had cached; -1 = its answer did not tell.
    """

    __slots__ = (
        "_accounts",
        "_answered",
        "_first_s",
        "_handed_off_s",
        "_labels",
        "_prompt_tokens",
        "_series",
        "_worker",
        "cached_tokens",
        "itl",
        "output_tokens",
        "started_s",
    )

    def __init__(self, accounts: Accounts, series: _Series, labels: tuple[str, str, str]) -> None:
        self._accounts = accounts
        self._series = series
        self._labels = labels
        self.itl = series.itl
        self.output_tokens = 0
        self.cached_tokens = -1
        self._answered = False
        self._prompt_tokens = 0
        self._first_s = self._handed_off_s = 0.0
        self._worker: _Worker | None = None
        self.started_s = time.monotonic()
        series.started.inc()
        series.active.inc()
        series.inflight.inc()
        series.queued.inc()

    def prompt(self, tokens: int) -> None:
        """The prompt's length, when it is known (not 0)."""
        if tokens:
            self._prompt_tokens = tokens
            self._series.input_tokens.observe(tokens)
            self._accounts.routed.input_tokens.observe(tokens)

    def handed_off(self) -> None:
        """Prefill has answered; decode is next."""
        self._handed_off_s = time.monotonic()

    def served_by(self, worker: str, rank: int, role: str) -> None:
        """The answer is to come from this worker."""
        self._worker = self._accounts.worker(worker, rank, role)

    def first_byte(self, now_s: float) -> None:
        """The first byte of a stream goes to the client. Once a request, however often it migrates."""
        if self._answered:
            return
        self._answer()
        self._first_s = now_s
        routed, ttft_s = self._accounts.routed, now_s - self.started_s
        self._series.ttft.observe(ttft_s)
        routed.ttft.observe(ttft_s)
        if self._handed_off_s:
            routed.transfer.observe(now_s - self._handed_off_s)
        if self._worker is not None:
            self._worker.ttft.set(ttft_s)
            self._worker.input_tokens.set(self._prompt_tokens)

    def _answer(self) -> None:
        if not self._answered:
            self._answered = True
            self._series.queued.dec()

    def close(self, error_type: str = "") -> None:
        """The request has ended; `error_type` is "" for a success."""
        series, now_s = self._series, time.monotonic()
        self._answer()
        series.active.dec()
        series.inflight.dec()
        series.duration.observe(now_s - self.started_s)
        if series.embedding is not None:
            series.embedding.observe(now_s - self.started_s)
        self._count_tokens(now_s)
        self._accounts.ended(self._labels, error_type)

    def _count_tokens(self, now_s: float) -> None:
        series, routed, tokens = self._series, self._accounts.routed, self.output_tokens
        if tokens:
            series.output_tokens.observe(tokens)
            series.output_total.inc(tokens)
            routed.output_tokens.observe(tokens)
        if tokens > 1 and self._first_s:
            itl_s = (now_s - self._first_s) / (tokens - 1)
            series.tpot.observe(itl_s)
            routed.itl.observe(itl_s)
            if self._worker is not None:
                self._worker.itl.set(itl_s)
        if self.cached_tokens >= 0:
            series.cached_tokens.observe(self.cached_tokens)
            routed.reused_tokens.inc(self.cached_tokens)


class Accounts:
    """Opens accounts. `model` must be a name that is served, never what a client made up."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._bound: dict[tuple[str, str, str], _Series] = {}
        self._ended: dict[tuple[str, str, str, str], Counter] = {}
        self._workers: dict[tuple[str, int], _Worker] = {}
        self.routed = _Routed(
            ttft=metrics.histogram("component_router_time_to_first_token_seconds"),
            itl=metrics.histogram("component_router_inter_token_latency_seconds"),
            input_tokens=metrics.histogram("component_router_input_sequence_tokens"),
            output_tokens=metrics.histogram("component_router_output_sequence_tokens"),
            reused_tokens=metrics.counter("component_router_kv_worker_reused_tokens_total"),
            transfer=metrics.histogram("component_router_kv_transfer_estimated_latency_seconds"),
        )

    def open(self, model: str, endpoint: str, *, stream: bool) -> Account:
        """Begin a request."""
        labels = (model, endpoint, "stream" if stream else "unary")
        series = self._bound.get(labels)
        if series is None:
            series = self._bound[labels] = self._bind(*labels)
        return Account(self, series, labels)

    def refused(self, endpoint: str, error_type: str) -> None:
        """Count what was refused before it was a request for a model: no key, no model, no JSON."""
        self.ended(("", endpoint, "unary"), error_type)

    def worker(self, worker: str, rank: int, role: str) -> _Worker:
        """The series of one rank of a worker."""
        series = self._workers.get((worker, rank))
        if series is None:
            labels = {"worker_id": worker, "dp_rank": str(rank), "worker_type": role}
            series = self._workers[worker, rank] = _Worker(
                ttft=self._metrics.gauge("worker_last_time_to_first_token_seconds", **labels),
                input_tokens=self._metrics.gauge("worker_last_input_sequence_tokens", **labels),
                itl=self._metrics.gauge("worker_last_inter_token_latency_seconds", **labels),
            )
        return series

    def forget(self, worker: str) -> None:
        """A worker has left."""
        self._workers = {key: series for key, series in self._workers.items() if key[0] != worker}

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
        elif error_type in ("unavailable", "overload") and labels[0]:
            self._metrics.counter("model_rejection_total", model=labels[0], endpoint=labels[1]).inc()

    def _bind(self, model: str, endpoint: str, request_type: str) -> _Series:
        metrics = self._metrics
        return _Series(
            started=metrics.counter(
                "requests_started_total", model=model, endpoint=endpoint, request_type=request_type
            ),
            active=metrics.gauge("active_requests", model=model),
            inflight=metrics.gauge("inflight_requests", model=model),
            queued=metrics.gauge("queued_requests", model=model),
            duration=metrics.histogram("request_duration_seconds", model=model),
            ttft=metrics.histogram("time_to_first_token_seconds", model=model),
            itl=metrics.histogram("inter_token_latency_seconds", model=model),
            tpot=metrics.histogram("time_per_output_token_seconds", model=model),
            input_tokens=metrics.histogram("input_sequence_tokens", model=model),
            output_tokens=metrics.histogram("output_sequence_tokens", model=model),
            output_total=metrics.counter("output_tokens_total", model=model),
            cached_tokens=metrics.histogram("cached_tokens", model=model),
            embedding=(
                metrics.histogram("embedding_latency_seconds", model=model)
                if endpoint == "embeddings"
                else None
            ),
        )
