"""What frontends' metrics say of a deployment between two looks at them. Pure.

Counters and histograms are summed over the frontends and taken as differences; what an engine said of itself
is the same at each frontend that has heard of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_LINE = re.compile(r"^(?:\w*?_)?frontend_(\w+?)(?:\{(.*)\})? (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""(name without its prefix, labels in order) → value."""


@dataclass(frozen=True, slots=True)
class Look:
    """All frontends at one time: `at` on any clock that does not go back, `series` by frontend."""

    at: float
    series: Mapping[str, Series]


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """Of one worker over its ranks; None where nothing is known. `kv_usage` and `hit_rate` are 0 to 1."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    hit_rate: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates a second, times in seconds; None where there was nothing to measure."""

    requests: float = 0.0
    tokens: float = 0.0
    errors: float = 0.0
    inflight: int = 0
    queued: int = 0
    hit_rate: float | None = None
    ttft: tuple[float | None, float | None] = (None, None)
    itl: tuple[float | None, float | None] = (None, None)
    workers: Mapping[str, WorkerFigures] = field(default_factory=dict)


def parse(text: str) -> Series:
    """The frontends' own series of an exposition."""
    found: Series = {}
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is not None:
            labels = tuple(sorted(_LABEL.findall(match[2] or "")))
            found[match[1], labels] = float(match[3])
    return found


def figures(before: Look, after: Look) -> Figures:
    """What happened in between, and how it is at the end."""
    seconds = max(after.at - before.at, 1e-9)
    grown = grown_between(before, after)
    now = list(after.series.values())
    workers = {dict(labels)["worker"] for one in now for name, labels in one if name in _TOLD}
    hits, asked = total([grown], "router_worker_prefix_hits_total"), total([grown], _QUERIES)
    return Figures(
        requests=total([grown], "requests_total") / seconds,
        tokens=total([grown], "output_tokens_total") / seconds,
        errors=total([grown], "requests_total", status="error") / seconds,
        inflight=int(total(now, "inflight_requests")),
        queued=int(total(now, "router_queue_pending_requests")),
        hit_rate=_ratio(hits, asked),
        ttft=_quantiles(grown, "time_to_first_token_seconds"),
        itl=_quantiles(grown, "inter_token_latency_seconds"),
        workers={worker: _worker(worker, now, grown) for worker in sorted(workers)},
    )


def quantile(buckets: Iterable[tuple[float, float]], share: float) -> float | None:
    """The value below which `share` of the counted lie, by (upper bound, cumulative count); None without any.

    Even within a bucket, as Prometheus has it; the last finite bound for what lies above that.
    """
    ordered = sorted(buckets)
    total = ordered[-1][1] if ordered else 0.0
    if total <= 0:
        return None
    wanted, low, below = share * total, 0.0, 0.0
    for bound, count in ordered:
        if count >= wanted and count > below:
            if bound == float("inf"):
                return low
            return low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


_QUERIES = "router_worker_prefix_queries_total"
_TOLD = ("router_worker_running", "router_worker_requests")


def grown_between(before: Look, after: Look) -> Series:
    """How much each counter grew, over all frontends; one that was started anew began at 0."""
    total: Series = {}
    for frontend, series in after.series.items():
        known = before.series.get(frontend, {})
        for key, value in series.items():
            was = known.get(key, 0.0)
            total[key] = total.get(key, 0.0) + (value - was if value >= was else value)
    return total


def total(series: Iterable[Series], name: str, **wanted: str) -> float:
    """The sum of all series of that name with these labels."""
    pairs = set(wanted.items())
    return sum(v for one in series for (n, labels), v in one.items() if n == name and pairs <= set(labels))


def buckets_of(series: Series, name: str) -> dict[float, float]:
    """A histogram over all its labels: cumulative count by upper bound."""
    buckets: dict[float, float] = {}
    for (key, labels), value in series.items():
        if key == f"{name}_bucket":
            bound = float(dict(labels)["le"])
            buckets[bound] = buckets.get(bound, 0.0) + value
    return buckets


def _quantiles(grown: Series, name: str) -> tuple[float | None, float | None]:
    buckets = buckets_of(grown, name)
    return quantile(buckets.items(), 0.5), quantile(buckets.items(), 0.95)


def told_of(name: str, label: tuple[str, str], now: Iterable[Series]) -> list[float]:
    """What is told under a name and a label, such as of all ranks of a worker, by the frontend that has heard
    of most.
    """
    lists = [[v for (n, labels), v in one.items() if n == name and label in labels] for one in now]
    return max(lists, key=len, default=[])


def _worker(worker: str, now: list[Series], grown: Series) -> WorkerFigures:
    running, waiting, usage = (
        told_of(f"router_worker_{what}", ("worker", worker), now)
        for what in ("running", "waiting", "kv_usage")
    )
    hits = total([grown], "router_worker_prefix_hits_total", worker=worker)
    return WorkerFigures(
        running=int(sum(running)) if running else None,
        waiting=int(sum(waiting)) if waiting else None,
        kv_usage=sum(usage) / len(usage) if usage else None,
        hit_rate=_ratio(hits, total([grown], _QUERIES, worker=worker)),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
