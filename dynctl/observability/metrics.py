"""Every metric of the serving tower in one catalogue, and the cheap series behind it.

A series is bound once (`Metrics.counter("retries_total", reason="peer_lost")`) and then costs an addition per
event: no lock, no label look-up. All series of one `Metrics` belong to one event loop's thread.
prometheus-client is only loaded, and only used, to write the exposition text.

Names, labels and buckets follow Dynamo's frontend (prefix `dynamo_frontend_`) where it has the metric, so its
dashboards work with the prefix changed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

PREFIX = "dynctl_frontend_"
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


def log_buckets(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` upper bounds from `low` to `high`, evenly spaced in the logarithm, two significant figures."""
    ratio = (high / low) ** (1 / (count - 1))
    return (*(float(f"{low * ratio**i:.1e}") for i in range(count - 1)), float(high))


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the catalogue. `name` is without the prefix; counters end in `_total`."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_MODEL = ("model",)
_RANK = ("worker", "rank")
_RATIO = tuple(i / 10 for i in range(11))

FRONTEND: tuple[Metric, ...] = (
    Metric(
        "requests_total",
        "counter",
        "Requests ended. status: success or error; error_type: empty, validation, not_found, overload, "
        "unavailable, cancelled, response_timeout, engine, internal.",
        ("model", "endpoint", "request_type", "status", "error_type"),
    ),
    Metric("requests_started_total", "counter", "Requests begun.", ("model", "endpoint", "request_type")),
    Metric("inflight_requests", "gauge", "Requests being worked on.", _MODEL),
    Metric("disconnected_clients_total", "counter", "Clients that went away before their answer had ended."),
    Metric("connections", "gauge", "Client connections open."),
    Metric("model_ready", "gauge", "1 when the model has the workers it needs.", _MODEL),
    Metric(
        "request_duration_seconds",
        "histogram",
        "From the request's last byte to the answer's last byte.",
        _MODEL,
        log_buckets(1, 512, 10),
    ),
    Metric(
        "time_to_first_token_seconds",
        "histogram",
        "From the request's last byte to the first byte of a streamed answer.",
        _MODEL,
        log_buckets(0.001, 480, 18),
    ),
    Metric(
        "inter_token_latency_seconds",
        "histogram",
        "Between two tokens of a streamed answer.",
        _MODEL,
        log_buckets(0.001, 80, 20),
    ),
    Metric(
        "input_sequence_tokens",
        "histogram",
        "Tokens of a prompt, where the frontend knows them.",
        _MODEL,
        log_buckets(50, 128_000, 12),
    ),
    Metric(
        "output_sequence_tokens",
        "histogram",
        "Tokens of an answer: the engine's usage when it is in the answer, else the events streamed.",
        _MODEL,
        log_buckets(50, 32_000, 10),
    ),
    Metric(
        "output_tokens_total", "counter", "Tokens of all answers, counted as output_sequence_tokens.", _MODEL
    ),
    Metric("template_seconds", "histogram", "Rendering the chat template.", (), log_buckets(0.00001, 1, 16)),
    Metric("tokenize_seconds", "histogram", "Tokenising a prompt.", (), log_buckets(0.00001, 10, 19)),
    Metric(
        "tokenize_fallbacks_total",
        "counter",
        "Prompts routed without tokens, and why.",
        ("reason",),
    ),
    Metric(
        "model_cancellation_total", "counter", "Requests cancelled by their client.", ("model", "endpoint")
    ),
    Metric(
        "model_rejection_total", "counter", "Requests refused for want of a worker.", ("model", "endpoint")
    ),
    Metric("retries_total", "counter", "Attempts made again on another worker, and why.", ("reason",)),
    Metric("upstream_failures_total", "counter", "Failed calls to a worker's engine.", ("worker", "reason")),
    Metric("handoffs_refused_total", "counter", "Prefill answers not given to decode, and why.", ("reason",)),
    Metric("prefill_seconds", "histogram", "The prefill leg, whole.", _MODEL, log_buckets(0.001, 480, 18)),
    Metric("router_choices_total", "counter", "Requests given to a worker.", ("role", "worker")),
    Metric(
        "router_kv_hit_rate",
        "histogram",
        "Share of a prompt's blocks that the chosen worker is known to hold.",
        (),
        _RATIO,
    ),
    Metric("router_choice_seconds", "histogram", "Choosing a worker.", (), log_buckets(0.000001, 0.1, 16)),
    Metric("router_workers", "gauge", "Workers that may be given requests.", ("role",)),
    Metric("router_worker_requests", "gauge", "Requests a worker has, ours and those it reports.", _RANK),
    Metric("router_kv_blocks", "gauge", "KV blocks the index holds for a worker.", _RANK),
    Metric("router_kv_synced", "gauge", "1 when the index knows all the worker's KV events.", _RANK),
    Metric("router_kv_gaps_total", "counter", "Gaps seen in a worker's numbered KV events.", _RANK),
    Metric(
        "router_kv_reloads_total", "counter", "Times a worker's index was begun anew from a snapshot.", _RANK
    ),
    Metric(
        "router_kv_worker_resets_total",
        "counter",
        "Times a worker lost its engine's KV events for good, as it says.",
        _RANK,
    ),
)
"""All metrics of a frontend."""


class Counter:
    """A sum that only rises."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        """Add `amount`."""
        self.value += amount

    def set(self, value: float) -> None:
        """Make it `value`: for what is counted elsewhere."""
        self.value = value


class Gauge(Counter):
    """A value that is set, or asked for when metrics are read."""

    __slots__ = ("read",)

    def __init__(self) -> None:
        super().__init__()
        self.read: Callable[[], float] | None = None

    def dec(self, amount: float = 1.0) -> None:
        """Take `amount` away."""
        self.value -= amount


class Histogram:
    """Counts by upper bound; the last count is of what is above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


Series = Counter | Gauge | Histogram


class Metrics:
    """The series of one process. Asking for one the catalogue has not is a programming error: KeyError."""

    def __init__(self, catalogue: tuple[Metric, ...] = FRONTEND, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        self._catalogue = {metric.name: metric for metric in catalogue}
        self._series: dict[str, dict[tuple[str, ...], Series]] = {name: {} for name in self._catalogue}

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter with exactly these labels, made at first use."""
        series = self._bind(name, labels, lambda _: Counter())
        assert isinstance(series, Counter)
        return series

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge with exactly these labels, made at first use."""
        series = self._bind(name, labels, lambda _: Gauge())
        assert isinstance(series, Gauge)
        return series

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram with exactly these labels, made at first use."""
        series = self._bind(name, labels, lambda metric: Histogram(metric.buckets))
        assert isinstance(series, Histogram)
        return series

    def drop(self, name: str, **labels: str) -> None:
        """Forget every series of `name` that carries all of `labels`: a worker that has left, say."""
        names = self._catalogue[name].labels
        for key in list(self._series[name]):
            values = dict(zip(names, key, strict=True))
            if all(values[k] == v for k, v in labels.items()):
                del self._series[name][key]

    def render(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self.families))
        return generate_latest(registry)

    def families(self) -> Iterator[Family]:
        """Each metric that has a series, as prometheus-client takes them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        for name, metric in self._catalogue.items():
            if not self._series[name]:
                continue
            full, labels = self._prefix + name, metric.labels
            counter = CounterMetricFamily(full, metric.help, labels=labels)
            gauge = GaugeMetricFamily(full, metric.help, labels=labels)
            histogram = HistogramMetricFamily(full, metric.help, labels=labels)
            for key, series in self._series[name].items():
                if isinstance(series, Histogram):
                    histogram.add_metric(key, _cumulated(series), series.total)
                elif isinstance(series, Gauge):
                    gauge.add_metric(key, series.value if series.read is None else series.read())
                else:
                    counter.add_metric(key, series.value)
            yield {"counter": counter, "gauge": gauge, "histogram": histogram}[metric.kind]

    def _bind(self, name: str, labels: Mapping[str, str], make: Callable[[Metric], Series]) -> Series:
        metric = self._catalogue[name]
        if len(labels) != len(metric.labels):
            raise KeyError(f"{name} takes the labels {metric.labels}, not {tuple(labels)}")
        key = tuple(labels[label] for label in metric.labels)
        series = self._series[name].get(key)
        if series is None:
            series = self._series[name][key] = make(metric)
        return series


class _Collector:
    """What prometheus-client calls a collector."""

    def __init__(self, families: Callable[[], Iterator[Family]]) -> None:
        self.collect = families


def _cumulated(series: Histogram) -> list[tuple[str, float]]:
    """Counts up to and including each bound, as the exposition format wants them."""
    rows: list[tuple[str, float]] = []
    running = 0
    for bound, count in zip((*series.bounds, math.inf), series.counts, strict=True):
        running += count
        rows.append(("+Inf" if bound == math.inf else repr(bound), float(running)))
    return rows
