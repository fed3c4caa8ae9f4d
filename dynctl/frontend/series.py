"""What stages and choices add to the metrics: series bound once, then added to."""

from __future__ import annotations

import time
from types import TracebackType

from dynctl.observability.metrics import Counter, Gauge, Histogram, Metrics
from dynctl.observability.tracing import Span

_MS = 1000.0


class Stage:
    """One request's time in a stage, and its span. Use with `with`."""

    __slots__ = ("_duration", "_now", "_started_s", "span")

    def __init__(self, now: Gauge, duration: Histogram, span: Span) -> None:
        self._now = now
        self._duration = duration
        self.span = span
        self._started_s = time.perf_counter()
        now.inc()

    def __enter__(self) -> Span:
        return self.span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._now.dec()
        self._duration.observe(time.perf_counter() - self._started_s)
        self.span.__exit__(kind, error, traceback)


class Stages:
    """The stages of all requests: preprocess, route, dispatch; `phase` is the role meant, "" for none."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._bound: dict[tuple[str, str], tuple[Gauge, Histogram]] = {}

    def enter(self, stage: str, span: Span, phase: str = "") -> Stage:
        """A request comes into `stage`, and leaves it, and ends `span`, with the `with` block."""
        series = self._bound.get((stage, phase))
        if series is None:
            series = self._bound[stage, phase] = (
                self._metrics.gauge("stage_requests", stage=stage, phase=phase),
                self._metrics.histogram("stage_duration_seconds", stage=stage),
            )
        return Stage(*series, span)


class Choices:
    """What the router chose, and how long that took."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = metrics.counter("component_router_requests_started_total")
        self._ended = metrics.counter("component_router_requests_total")
        self._hit_rate = metrics.histogram("component_router_kv_hit_rate")
        self._seconds = metrics.histogram("router_choice_seconds")
        self._scheduling = metrics.histogram("router_overhead_scheduling_ms")
        self._total = metrics.histogram("router_overhead_total_ms")
        self._by_worker: dict[tuple[str, str], Counter] = {}

    def begun(self) -> None:
        """A request is to be routed."""
        self._started.inc()

    def chosen(self, role: str, worker: str, seconds: float) -> None:
        """A worker was chosen in `seconds`."""
        counter = self._by_worker.get((role, worker))
        if counter is None:
            counter = self._metrics.counter("router_choices_total", role=role, worker=worker)
            self._by_worker[role, worker] = counter
        counter.inc()
        self._ended.inc()
        self._seconds.observe(seconds)
        self._scheduling.observe(seconds * _MS)
        self._total.observe(seconds * _MS)

    def hit_rate(self, share: float) -> None:
        """The share of a prompt's blocks that the chosen worker is known to hold."""
        self._hit_rate.observe(share)
