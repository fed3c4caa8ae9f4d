"""Straight lines between measured points. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def segment(xs: Sequence[float], x: float) -> tuple[int, float]:
    """Index i and weight w such that x = xs[i] + w * (xs[i+1] - xs[i]).

    `xs` rises strictly and holds at least two points. Outside of it the nearest segment is prolonged, so w
    may be below 0 or above 1.
    """
    i = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
    return i, (x - xs[i]) / (xs[i + 1] - xs[i])


def linear(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """y at x on the polyline through (xs, ys); prolonged beyond both ends."""
    i, w = segment(xs, x)
    return ys[i] + w * (ys[i + 1] - ys[i])


def bilinear(
    xs: Sequence[float], ys: Sequence[float], grid: Sequence[Sequence[float]], x: float, y: float
) -> float:
    """z at (x, y), where grid[i][j] is z at (xs[i], ys[j]); prolonged beyond the edges."""
    i, w = segment(xs, x)
    j, v = segment(ys, y)
    low = grid[i][j] + v * (grid[i][j + 1] - grid[i][j])
    high = grid[i + 1][j] + v * (grid[i + 1][j + 1] - grid[i + 1][j])
    return low + w * (high - low)
