"""Times of an engine as few numbers, fitted to few measured points with an estimate to lean on. Pure.

    reading a prompt of L tokens in n steps      n·a + b·L + c·L²
    one step of B answers, K tokens of KV        a + b·B + c·K           K = B · mean context

What the points leave open stays as the estimate has it: the least squares of measured points, each trusted to
`NOISE` of its value, and of the estimate's own numbers, each trusted to `SPREAD` of what it adds to a typical
point (the posterior mean of a linear model with a normal prior).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dynctl.perfmodel.profile import DecodeGrid, PrefillCurve, Profile

NOISE = 0.02
SPREAD = 1.0
_TIES = 1e-9

Row = tuple[tuple[float, ...], float]
"""(What each number is multiplied by, seconds)."""


def prefill_row(tokens: float, seconds: float, steps: int = 1) -> Row:
    """A prompt that was read alone."""
    return (float(steps), tokens, tokens**2), seconds


def decode_row(batch: float, context: float, seconds: float) -> Row:
    """A step of a batch."""
    return (1.0, batch, batch * context), seconds


def plain(rows: Sequence[Row]) -> tuple[float, ...]:
    """The numbers, none negative, that come nearest to the rows relative to their seconds."""
    return _nearest([(_over(xs, y), 1.0) for xs, y in rows if y > 0.0])


def posterior(rows: Sequence[Row], prior: Sequence[float], spread: float = SPREAD) -> tuple[float, ...]:
    """The numbers, none negative, from measured rows and those of an estimate."""
    if not rows:
        return tuple(prior)
    told = [(_over(xs, y * NOISE), 1.0 / NOISE) for xs, y in rows]
    typical = fmean(y for _, y in rows)
    for j, number in enumerate(prior):
        part = fmean(abs(xs[j]) for xs, _ in rows)
        weight = part / (spread * typical)
        told.append((tuple(weight if i == j else 0.0 for i in range(len(prior))), weight * number))
    return _nearest(told)


def _over(xs: Sequence[float], by: float) -> tuple[float, ...]:
    return tuple(x / by for x in xs)


def _nearest(rows: Sequence[Row]) -> tuple[float, ...]:
    """Least squares without negative numbers: whichever comes out most negative is left at 0."""
    size = len(rows[0][0]) if rows else 3
    kept = list(range(size))
    while kept:
        found = _solved([(tuple(xs[j] for j in kept), y) for xs, y in rows])
        # Judged by what it adds: the numbers have different units.
        adds = [value * max(abs(xs[j]) for xs, _ in rows) for value, j in zip(found, kept, strict=True)]
        if min(adds) >= 0.0:
            values = dict(zip(kept, found, strict=True))
            return tuple(values.get(j, 0.0) for j in range(size))
        kept.pop(adds.index(min(adds)))
    return (0.0,) * size


def _solved(rows: Sequence[Row]) -> list[float]:
    """The normal equations, columns scaled to the same size, by elimination; a column that the rows cannot
    tell from others gets a number near 0.
    """
    size = len(rows[0][0])
    scales = [max(abs(xs[j]) for xs, _ in rows) or 1.0 for j in range(size)]
    table = [
        [sum(xs[i] / scales[i] * xs[j] / scales[j] for xs, _ in rows) for j in range(size)]
        + [sum(xs[i] / scales[i] * y for xs, y in rows)]
        for i in range(size)
    ]
    for i in range(size):
        table[i][i] += _TIES
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        for k in range(size):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [left - factor * right for left, right in zip(table[k], table[i], strict=True)]
    return [table[i][-1] / table[i][i] / scales[i] for i in range(size)]


def prior_of(profile: Profile) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """An estimate as such numbers: of reading, of steps."""
    curve, grid = profile.prefill, profile.decode
    reading = [
        prefill_row(tokens, seconds) for tokens, seconds in zip(curve.tokens, curve.seconds, strict=True)
    ]
    steps = [
        decode_row(batch, context, seconds)
        for batch, row in zip(grid.batch, grid.seconds, strict=True)
        for context, seconds in zip(grid.context, row, strict=True)
    ]
    return plain(reading), plain(steps)


def refitted(
    profile: Profile, reading: Sequence[Row], steps: Sequence[Row], spread: float = SPREAD
) -> Profile:
    """The estimate's profile brought to what was measured, at the estimate's own points and the measured
    ones; where nothing was measured of reading or of steps, that stays as it is.
    """
    curve, grid = profile.prefill, profile.decode
    priors = prior_of(profile)
    if reading:
        a, b, c = posterior(reading, priors[0], spread)
        tokens = sorted({*curve.tokens, *(xs[1] for xs, _ in reading)})
        curve = PrefillCurve(tokens=tuple(tokens), seconds=tuple(a + b * x + c * x**2 for x in tokens))
    if steps:
        a, b, c = posterior(steps, priors[1], spread)
        batches = sorted({*grid.batch, *(xs[1] for xs, _ in steps)})
        rows = tuple(tuple(a + b * n + c * n * context for context in grid.context) for n in batches)
        grid = DecodeGrid(batch=tuple(batches), context=grid.context, seconds=rows)
    return Profile(
        version=profile.version,
        name=profile.name,
        prefill=curve,
        decode=grid,
        transfer=profile.transfer,
        limits=profile.limits,
        subject=profile.subject,
        source="measured" if reading and steps else profile.source,
    )


def scaled(profile: Profile, *, prefill: float = 1.0, decode: float = 1.0) -> Profile:
    """The same with all times of reading, and of steps, times so much."""
    curve, grid = profile.prefill, profile.decode
    return Profile(
        version=profile.version,
        name=profile.name,
        prefill=PrefillCurve(tokens=curve.tokens, seconds=tuple(s * prefill for s in curve.seconds)),
        decode=DecodeGrid(
            batch=grid.batch,
            context=grid.context,
            seconds=tuple(tuple(s * decode for s in row) for row in grid.seconds),
        ),
        transfer=profile.transfer,
        limits=profile.limits,
        subject=profile.subject,
        source=profile.source,
    )
