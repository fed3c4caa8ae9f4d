"""The cheap series behind the metrics: bound once, then an addition per event.

A series is bound once (`Metrics.counter("retries_total", reason="peer_lost")`) and then costs an addition per
event: no lock, no label look-up. All series of one `Metrics` belong to one event loop's thread.
prometheus-client is only loaded, and only used, to write the exposition text. What there is to bind is in
`observability.catalogue`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from dynctl.observability.catalogue import FRONTEND, Metric

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

PREFIX = "dynctl"
CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


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
    """The series of one process. Asking for one the catalogue has not is a programming error: KeyError.

    `prefix` goes before every name. `own` are labels that are the same for the whole process (`router_id`):
    rows that have them get them without being told.
    """

    def __init__(
        self,
        catalogue: tuple[Metric, ...] = FRONTEND,
        prefix: str = PREFIX,
        own: Mapping[str, str] | None = None,
    ) -> None:
        self._prefix = prefix
        self._own = {"router_id": ""} if own is None else dict(own)
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
            full, labels = f"{self._prefix}_{metric.scope}{name}", metric.labels
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

    def _bind(self, name: str, labels: dict[str, str], make: Callable[[Metric], Series]) -> Series:
        metric = self._catalogue[name]
        given = {name: value for name, value in self._own.items() if name in metric.labels} | labels
        if len(given) != len(metric.labels):
            raise KeyError(f"{name} takes the labels {metric.labels}, not {tuple(labels)}")
        key = tuple(given[label] for label in metric.labels)
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
