"""What a series will be: from its past values, one an interval, to those of the next intervals. Pure.

Leading zeros (before traffic began) are skipped, values that are no numbers count as 0, and no forecast is
below 0. While there is too little to go by, the last value is the forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean

from dynctl.planner.config import Predictor

_ENOUGH = 5
"""Points from which on a trend is looked for."""
_WINDOW = 10
_LAGS = 2
_FITTED = 60
"""Of a longer past only so many values are fitted: the load of last week says little of its slope now."""
_NOISES = (0.1, 1.0, 10.0)
_LASTS = {0.8: 1.0, 1.0: 1.25}
"""What is left of a trend after each interval, and how many times less it must have missed to be believed."""
_WARM = 3
"""Values after which the filter knows where it is."""
_MOST_GROWTH = 4.0
"""No forecast is above so many times the highest value of late: a trend is not prolonged without end."""


def predict(name: Predictor, past: Sequence[float], steps: int, season: int = 0) -> list[float]:
    """The next `steps` values of `past`, oldest first. `season`: intervals after which it repeats itself."""
    clean = [value if math.isfinite(value) else 0.0 for value in past]
    first = next((i for i, value in enumerate(clean) if value > 0.0), len(clean))
    series = clean[first:]
    if not series:
        return [0.0] * steps
    if name == "seasonal":
        made = seasonal(series, steps, season)
    elif len(series) < _ENOUGH:
        made = constant(series, steps)
    else:
        made = _BY_NAME[name](series, steps)
    most = _MOST_GROWTH * max(series[-max(_WINDOW, season) :])
    return [min(most, max(0.0, value)) if math.isfinite(value) else series[-1] for value in made]


def constant(series: Sequence[float], steps: int) -> list[float]:
    """As it is now."""
    return [series[-1]] * steps


def moving_average(series: Sequence[float], steps: int) -> list[float]:
    """The mean of the last ten."""
    return [fmean(series[-_WINDOW:])] * steps


def kalman(series: Sequence[float], steps: int) -> list[float]:
    """A level and a trend that wander (local linear trend), by the Kalman filter. How much of what is seen is
    noise, and whether a trend goes on or fades (Gardner and McKenzie), is told by the past: of some guesses
    the one whose forecasts of the next value would have been best.
    """
    tried = [(*_filtered(series, noise, lasts), lasts) for noise in _NOISES for lasts in _LASTS]
    _, level, trend, lasts = min(tried, key=lambda one: one[0] * _LASTS[one[3]])
    made = []
    for _ in range(steps):
        trend *= lasts
        level += trend
        made.append(level)
    return made


def _filtered(series: Sequence[float], noise: float, lasts: float) -> tuple[float, float, float]:
    """(Mean square of what its forecasts of the next value missed of late, level, trend).

    State x = [level, trend], F = [[1, lasts], [0, lasts]], H = [1, 0]; Q = diag(1, 1), R = noise, relative
    to a series of the order of 10: they are scaled by its mean square, so that the unit does not matter. P0
    is wide.
    """
    unit = max(fmean(value * value for value in series), 1e-12) / 100.0
    q_level = q_trend = unit
    noise *= unit
    level, trend = series[0], 0.0
    p00, p01, p11 = 1000.0 * unit, 0.0, 1000.0 * unit
    misses = []
    for value in series:
        trend *= lasts
        level += trend
        p01, p11 = p01 * lasts, p11 * lasts * lasts
        p00, p01, p11 = p00 + 2.0 * p01 + p11 + q_level, p01 + p11, p11 + q_trend
        gain, slope = p00 / (p00 + noise), p01 / (p00 + noise)
        missed = value - level
        misses.append(missed * missed)
        level, trend = level + gain * missed, trend + slope * missed
        p00, p01, p11 = (1.0 - gain) * p00, (1.0 - gain) * p01, p11 - slope * p01
    return fmean(misses[_WARM:][-_FITTED:]), level, trend


def arima(series: Sequence[float], steps: int) -> list[float]:
    """ARIMA(2, 1, 0): the differences are fitted as an autoregression, its coefficients by least squares.

    A fit that would swing ever wider (a root outside the unit circle) is drawn in. Differences without a
    pattern give the last level smoothed, which is what they tell.
    """
    recent = series[-_FITTED:]
    steps_made = [b - a for a, b in pairwise(recent)]
    first, second = _stable(_autoregression(steps_made))
    before, last = steps_made[-_LAGS:]
    level = recent[-1]
    made = []
    for _ in range(steps):
        before, last = last, first * last + second * before
        level += last
        made.append(level)
    return made


def seasonal(series: Sequence[float], steps: int, season: int) -> list[float]:
    """What came after the same time one season ago, times how much more there is now than there was then.

    Until a season has passed: as it is now.
    """
    if season < 1 or len(series) < season + 1:
        return constant(series, steps)
    window = min(_WINDOW, season, len(series) - season)
    now = fmean(series[-window:])
    then = fmean(series[len(series) - season - window : len(series) - season])
    ratio = min(_MOST_GROWTH, max(1.0 / _MOST_GROWTH, now / then)) if then > 0.0 else 1.0
    last = len(series) - season
    return [series[last + step % season] * ratio for step in range(steps)]


def _autoregression(series: Sequence[float]) -> tuple[float, float]:
    """Coefficients of a value on the two before it, by the normal equations; (0, 0) where it has none."""
    rows = [(series[i - 1], series[i - 2], series[i]) for i in range(_LAGS, len(series))]
    a11 = sum(x * x for x, _, _ in rows)
    a12 = sum(x * y for x, y, _ in rows)
    a22 = sum(y * y for _, y, _ in rows)
    b1 = sum(x * z for x, _, z in rows)
    b2 = sum(y * z for _, y, z in rows)
    ridge = 1e-3 * (a11 + a22)
    a11, a22 = a11 + ridge, a22 + ridge
    determinant = a11 * a22 - a12 * a12
    if determinant <= 0.0:
        return 0.0, 0.0
    return (a22 * b1 - a12 * b2) / determinant, (a11 * b2 - a12 * b1) / determinant


def _stable(coefficients: tuple[float, float]) -> tuple[float, float]:
    """The nearest multiple of the coefficients that is damped: |first| + |second| < 1 suffices."""
    first, second = coefficients
    size = abs(first) + abs(second)
    return coefficients if size < 0.95 else (first * 0.95 / size, second * 0.95 / size)


_BY_NAME: dict[str, Callable[[Sequence[float], int], list[float]]] = {
    "constant": constant,
    "moving_average": moving_average,
    "arima": arima,
    "kalman": kalman,
}
