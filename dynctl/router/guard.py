"""Keeps cached prefixes from overloading a worker: routing by cache is to do no worse than by load. Pure.

A hot prefix makes each request cost so little where it is cached that a cost in tokens alone would queue any
number of them there. So requests are counted beside it, against the mean of all workers of a role:

- *crowded*: more than `requests_ratio` times the mean plus `requests_slack`. It gets nothing, whatever it
  holds. The slack is for workers with room: one with `kv_usage` of its KV blocks in use and requests waiting
  in its engine has none, so that what it holds buys it nothing beyond its share.
- *starved*: fewer than the mean over `requests_ratio`, less `requests_slack`. While there is such a worker,
  those above the mean get nothing.

The least busy worker is never crowded, so there is always one to choose. That all are busy keeps requests
from none of them: then what is cached counts most.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynctl.protocol.specs import GuardSpec
from dynctl.router.active import RankLoad


def crowded(spec: GuardSpec, loads: Sequence[RankLoad]) -> list[bool] | None:
    """For each of `loads` (at least one) whether it gets nothing now; None = all may be chosen."""
    if not spec.enabled:
        return None
    requests = [load.requests for load in loads]
    mean = sum(requests) / len(requests)
    if min(requests) < mean / spec.requests_ratio - spec.requests_slack:
        return [count > mean for count in requests]
    share = spec.requests_ratio * mean
    if max(requests) <= share:
        return None
    limits = [share if _full(spec, load) else share + spec.requests_slack for load in loads]
    found = [count > limit for count, limit in zip(requests, limits, strict=True)]
    return found if any(found) else None


def _full(spec: GuardSpec, load: RankLoad) -> bool:
    return load.reported_waiting > 0 and 0 < load.capacity * spec.kv_usage <= load.blocks
