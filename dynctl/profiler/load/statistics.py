"""Percentiles, and how sure they are. Pure; no numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

import msgspec

CONFIDENCE = 0.95
PERCENTS = (50, 90, 95, 99)
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
_EXACT_BELOW = 2000


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A value and the interval that holds it in 95 of 100 cases; None: the sample is too small to tell."""

    value: float
    low: float | None = None
    high: float | None = None

    def apart_from(self, other: Estimate) -> bool:
        """Whether the intervals do not meet: the difference is no chance. False when either is not known."""
        if None in (self.low, self.high, other.low, other.high):
            return False
        return self.low > other.high or other.low > self.high  # type: ignore[operator]  # none is None


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """A quantity over many requests: `count` of them, `percentiles` by name ("p50" …)."""

    count: int
    mean: float
    std: float
    min: float
    max: float
    percentiles: dict[str, Estimate]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The `share` (0..1) quantile of sorted values, straight lines between them (as numpy does it)."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def figure(
    values: Sequence[float], *, independent: int | None = None, also: float | None = None
) -> Figure | None:
    """What is to be told of `values`; None without any. `also` is one more percentile, as a share (0.9: p90).

    Intervals are those of order statistics, which need no law of distribution: the ranks between which the
    quantile of a binomial count lies. `independent`: how many of the values are so, when several came from
    one request and go together; the intervals are those of as large a sample.
    """
    if not values:
        return None
    ordered = sorted(values)
    shares = sorted({*(percent / 100 for percent in PERCENTS), *([] if also is None else [also])})
    return Figure(
        count=len(ordered),
        mean=fmean(ordered),
        std=stdev(ordered) if len(ordered) > 1 else 0.0,
        min=ordered[0],
        max=ordered[-1],
        percentiles={
            label(share): _estimate(ordered, share, independent or len(ordered)) for share in shares
        },
    )


def label(share: float) -> str:
    """0.95 → p95, 0.999 → p99.9."""
    return f"p{share * 100:g}"


def proportion(hits: int, count: int) -> Estimate:
    """The share of hits, with Wilson's interval."""
    if not count:
        return Estimate(value=0.0)
    share, square = hits / count, _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z * math.sqrt(share * (1 - share) / count + square / (4 * count * count)) / (1 + square / count)
    return Estimate(value=share, low=max(0.0, middle - half), high=min(1.0, middle + half))


def mean_of_slices(values: Sequence[float]) -> Estimate:
    """The mean of a series cut into slices of time, each one value: the interval is Student's."""
    if len(values) < 2:
        return Estimate(value=values[0] if values else 0.0)
    half = _student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    middle = fmean(values)
    return Estimate(value=middle, low=middle - half, high=middle + half)


def _estimate(ordered: Sequence[float], share: float, independent: int) -> Estimate:
    ranks = _ranks(independent, share)
    value = quantile(ordered, share)
    if ranks is None:
        return Estimate(value=value)
    scale = len(ordered) / independent
    low = ordered[max(0, math.ceil(ranks[0] * scale) - 1)]
    high = ordered[min(len(ordered) - 1, math.ceil(ranks[1] * scale) - 1)]
    return Estimate(value=value, low=min(low, value), high=max(high, value))


def _ranks(count: int, share: float) -> tuple[int, int] | None:
    """Ranks (from 1) that hold the quantile; None when the sample has no such ranks."""
    if count >= _EXACT_BELOW:
        half = _Z * math.sqrt(count * share * (1 - share))
        low, high = math.floor(count * share - half), math.ceil(count * share + half) + 1
        return (low, high) if low >= 1 and high <= count else None
    tail = (1 - CONFIDENCE) / 2
    low = high = 0
    below = 0.0  # P(fewer than `rank` of the sample lie below the quantile)
    for rank in range(1, count + 1):
        below += _binomial(count, rank - 1, share)
        if below <= tail:
            low = rank
        if not high and below >= 1 - tail:
            high = rank
    return (low, high) if low and high else None


def _binomial(count: int, hits: int, share: float) -> float:
    if share in (0.0, 1.0):
        return float(hits == count * share)
    log = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(log + hits * math.log(share) + (count - hits) * math.log(1 - share))


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz & Stegun 26.7.5; within 1 % from 4 up)."""
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(sum(term / freedom**power for power, term in enumerate(terms)))
