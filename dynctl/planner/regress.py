"""What a replica costs, learnt from what was seen of it: straight lines through a bounded sample. Pure.

    prefill   t = a + b * prompt tokens computed
    decode    t = a + b * requests + c * tokens held        (b, c >= 0)

An estimate is corrected by the same samples: they count as points that were measured, if badly.

Samples are kept in buckets of what they were seen at, at most so many in all; the oldest of the fullest
bucket goes first. So a long quiet time does not push out what was seen under load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynctl.perfmodel.fit import NOISE, decode_row, prefill_row, refitted
from dynctl.perfmodel.profile import VERSION, DecodeGrid, Limits, PrefillCurve, Profile, Transfer

ENOUGH = 5
"""Samples from which on a line is drawn."""
_SAMPLES = 64
_TRUST = 0.2
"""How far a sample may be off, as a share of it: it is the mean over what came in one look."""
_SIDE = 4
"""Buckets along each of two sizes; 16 along one."""
_LIMITS = Limits(kv_tokens=1 << 20, sequences=256, batched_tokens=8192)


@dataclass(slots=True)
class Sample:
    """(sizes, seconds) of what was seen, bounded and spread over the sizes."""

    sizes: int
    points: list[tuple[tuple[float, ...], float]] = field(default_factory=list)

    def add(self, at: tuple[float, ...], seconds: float) -> None:
        """One more; of too many the oldest of the fullest bucket goes."""
        if seconds <= 0.0 or any(one < 0.0 for one in at):
            return
        self.points.append((at, seconds))
        if len(self.points) <= _SAMPLES:
            return
        axes = list(zip(*(at for at, _ in self.points), strict=True))
        bounds = [(min(axis), max(axis)) for axis in axes]
        buckets = [self._bucket(at, bounds) for at, _ in self.points]
        count = Counter(buckets)
        fullest = max(count, key=lambda one: (count[one], one))
        del self.points[buckets.index(fullest)]

    def _bucket(self, at: tuple[float, ...], bounds: list[tuple[float, float]]) -> tuple[int, ...]:
        side = _SIDE if self.sizes > 1 else _SIDE * _SIDE
        return tuple(
            min(side - 1, int(side * (value - low) / (high - low))) if high > low else 0
            for value, (low, high) in zip(at, bounds, strict=True)
        )


def fit_prefill(sample: Sample) -> tuple[float, float] | None:
    """(a, b) of the prefill line; None with too few samples or when it would fall.

    Seen at one length only, all of the time is taken to be by the token.
    """
    if len(sample.points) < ENOUGH:
        return None
    xs = [at[0] for at, _ in sample.points]
    ys = [seconds for _, seconds in sample.points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if mean_x <= 0.0:
        return None
    if spread < (0.05 * mean_x) ** 2 * len(xs):
        return 0.0, mean_y / mean_x
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    if slope <= 0.0:
        return None
    start = mean_y - slope * mean_x
    return (start, slope) if start >= 0.0 else (0.0, mean_y / mean_x)


def fit_decode(sample: Sample) -> tuple[float, float, float] | None:
    """(a, b, c) of the decode plane; None with too few samples or when it falls with the tokens held.

    b below 0 is taken as 0 and the rest fitted anew. Requests and tokens that always went together are told
    apart no further: then it goes by requests alone.
    """
    if len(sample.points) < ENOUGH:
        return None
    rows = [(at[0], at[1], seconds) for at, seconds in sample.points]
    full = _plane(rows)
    if full is None:
        line = _line([(n, t) for n, _, t in rows])
        return (line[0], line[1], 0.0) if line else None
    _, slope_n, slope_kv = full
    if slope_kv < 0.0:
        return None
    if slope_n < 0.0:
        line = _line([(kv, t) for _, kv, t in rows])
        return (line[0], 0.0, line[1]) if line else None
    return full


def corrected(
    estimate: Profile, prefill: Sample, decode: Sample, after_s: Callable[[float], float]
) -> tuple[Profile, bool]:
    """The estimate brought to what was seen, and whether anything was: reading and steps each from `ENOUGH`
    samples on. `after_s`: of a time to first token, what comes after the reading of so many tokens.
    """
    reading = [
        prefill_row(at[0], own_s)
        for at, seconds in prefill.points
        if (own_s := seconds - after_s(at[0])) > 0.0
    ]
    steps = [decode_row(at[0], at[1] / at[0], seconds) for at, seconds in decode.points if at[0] > 0.0]
    reading, steps = (rows if len(rows) >= ENOUGH else [] for rows in (reading, steps))
    if not reading and not steps:
        return estimate, False
    return refitted(estimate, reading, steps, NOISE / _TRUST), True


def profile_of(
    prefill: tuple[float, float] | None,
    decode: tuple[float, float, float] | None,
    limits: Limits | None,
    moved: Transfer | None = None,
) -> Profile:
    """A profile with these lines; what is not known costs nothing."""
    start, slope = prefill or (0.0, 0.0)
    base, by_request, by_token = decode or (0.0, 0.0, 0.0)
    batches, contexts = (1.0, 1024.0), (0.0, 131072.0)
    grid = tuple(tuple(max(0.0, base) + by_request * n + by_token * n * c for c in contexts) for n in batches)
    return Profile(
        version=VERSION,
        name="learnt",
        prefill=PrefillCurve(tokens=(0.0, 131072.0), seconds=(start, start + slope * 131072.0)),
        decode=DecodeGrid(batch=batches, context=contexts, seconds=grid),
        transfer=moved or Transfer(bytes_per_token=0.0, bytes_per_s=1.0),
        limits=limits or _LIMITS,
        source="measured",
    )


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Intercept and slope; None when it falls. At one place only: a constant."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    if spread <= 1e-9 * max(1.0, mean_x**2) * len(points):
        return mean_y, 0.0
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    return (mean_y - slope * mean_x, slope) if slope >= 0.0 else None


def _plane(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float, float] | None:
    """Least squares of the third on the first two; None where those lie on a line."""
    count = len(rows)
    mean_x, mean_y, mean_z = (sum(row[i] for row in rows) / count for i in range(3))
    centred = [(x - mean_x, y - mean_y, z - mean_z) for x, y, z in rows]
    xx, yy, xy = (
        sum(x * x for x, _, _ in centred),
        sum(y * y for _, y, _ in centred),
        sum(x * y for x, y, _ in centred),
    )
    xz, yz = sum(x * z for x, _, z in centred), sum(y * z for _, y, z in centred)
    determinant = xx * yy - xy * xy
    if determinant <= 1e-3 * xx * yy or not determinant:
        return None
    slope_x, slope_y = (yy * xz - xy * yz) / determinant, (xx * yz - xy * xz) / determinant
    return mean_z - slope_x * mean_x - slope_y * mean_y, slope_x, slope_y
