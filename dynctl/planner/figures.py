"""From the frontends' own figures to an observation. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from dynctl.deploy.figures import Look, Series, buckets_of, grown_between, quantile, told_of, total
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role

_STARTED = "requests_started_total"
_PROMPT, _ANSWER = "input_sequence_tokens", "output_sequence_tokens"
_TTFT, _TPOT = "time_to_first_token_seconds", "time_per_output_token_seconds"
_GAP = "inter_token_latency_seconds"


@dataclass(frozen=True, slots=True)
class Seats:
    """The replicas of one role as the controller sees them: `load` without workers, ids of the ready ones."""

    load: RoleLoad
    ready: tuple[str, ...]
    ranks: int = 1


def observation(before: Look, after: Look, roles: Mapping[Role, Seats], percentile: float) -> Observation:
    """What happened between two looks, and how it is at the second. Arrivals are counted as they come.

    Requests for embeddings are nobody's to generate for and do not count.
    """
    grown, now = grown_between(before, after), list(after.series.values())
    arrivals = total([grown], _STARTED) - total([grown], _STARTED, endpoint="embeddings")
    blocks = max((total([one], "model_total_kv_blocks") for one in now), default=0.0)
    size = max((total([one], "model_kv_cache_block_size") for one in now), default=0.0)
    ranks = max((seats.ranks for seats in roles.values()), default=1)
    return Observation(
        span_s=max(after.at - before.at, 1e-9),
        arrivals=round(arrivals),
        roles={role: _load(seats, now) for role, seats in roles.items()},
        isl=_mean(grown, _PROMPT),
        isl_cv=spread(buckets_of(grown, _PROMPT)),
        osl=_mean(grown, _ANSWER),
        hit_rate=_hits(grown),
        queued=int(total(now, "router_queue_pending_requests")),
        ttft_s=quantile(buckets_of(grown, _TTFT).items(), percentile),
        itl_s=quantile(buckets_of(grown, _TPOT).items(), percentile),
        ttft_mean_s=_mean(grown, _TTFT),
        itl_mean_s=_mean(grown, _GAP),
        kv_tokens=round(blocks * size) * ranks,
    )


def _load(seats: Seats, now: Sequence[Series]) -> RoleLoad:
    return msgspec.structs.replace(seats.load, workers=tuple(_worker(one, now) for one in seats.ready))


def _worker(worker: str, now: Sequence[Series]) -> WorkerLoad:
    def told(name: str, label: str = "worker") -> list[float]:
        return told_of(name, (label, worker), now)

    usage = told("router_worker_kv_usage")
    return WorkerLoad(
        id=worker,
        prefill_tokens=sum(told("worker_active_prefill_tokens", "worker_id")),
        running=sum(told("router_worker_running")),
        waiting=sum(told("router_worker_waiting")),
        kv_usage=sum(usage) / len(usage) if usage else None,
    )


def _mean(grown: Series, name: str) -> float | None:
    count = total([grown], f"{name}_count")
    return total([grown], f"{name}_sum") / count if count > 0 else None


def spread(buckets: Mapping[float, float]) -> float | None:
    """Standard deviation by mean, of cumulative counts by upper bound; each bucket is taken at the geometric
    middle of its bounds. None of fewer than two.
    """
    ordered = sorted(buckets.items())
    sizes: list[tuple[float, float]] = []
    low = below = 0.0
    for bound, count in ordered:
        high = bound if math.isfinite(bound) else 2.0 * low
        if count > below:
            sizes.append((math.sqrt(max(low, high / 4.0) * high), count - below))
        low, below = high, max(below, count)
    seen = sum(count for _, count in sizes)
    if seen < 2 or not sizes[0][0]:
        return None
    mean = sum(size * count for size, count in sizes) / seen
    square = sum(size * size * count for size, count in sizes) / seen
    return math.sqrt(max(0.0, square - mean * mean)) / mean


def _hits(grown: Series) -> float | None:
    asked = total([grown], "router_worker_prefix_queries_total")
    return min(1.0, total([grown], "router_worker_prefix_hits_total") / asked) if asked > 0 else None
