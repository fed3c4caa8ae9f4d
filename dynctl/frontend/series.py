"""What stages and choices add to the metrics: series bound once, then added to."""

from __future__ import annotations

import time
from types import TracebackType

from dynctl.observability.metrics import Counter, Gauge, Histogram, Metrics
from dynctl.observability.tracing import Span
from dynctl.router.request import Choice

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
        self._best = metrics.counter("component_router_kv_best_eligible_cached_prefix_tokens_total")
        self._selected = metrics.counter("component_router_kv_selected_cached_prefix_tokens_total")
        self._skipped = metrics.counter("router_prefill_skipped_total")
        self._by_worker: dict[tuple[str, str], Counter] = {}
        self._passed_over: dict[str, tuple[Counter, Histogram]] = {}

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

    def skipped_prefill(self) -> None:
        """A decode worker was left to compute a prompt itself."""
        self._skipped.inc()

    def overlap(self, role: str, choice: Choice, prompt_blocks: int, block_tokens: int) -> None:
        """How much of a prompt the chosen worker is known to hold, and the best one would have held."""
        chosen, best = choice.overlap_blocks, max(choice.overlap_blocks, choice.best_overlap_blocks)
        self._hit_rate.observe(min(1.0, chosen / prompt_blocks))
        self._selected.inc(chosen * block_tokens)
        self._best.inc(best * block_tokens)
        if best > chosen:
            passed_over = self._passed_over.get(role)
            if passed_over is None:
                passed_over = self._passed_over[role] = (
                    self._metrics.counter(
                        "component_router_non_max_overlap_selections_total", worker_type=role
                    ),
                    self._metrics.histogram("component_router_overlap_blocks_lost", worker_type=role),
                )
            passed_over[0].inc()
            passed_over[1].observe(best - chosen)
