"""Predictions for rows of a table, and how far they are from what was measured. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.calibration import Calibration, calibration
from dynctl.perfmodel.points import Row, Shapes, deployment_of
from dynctl.perfmodel.serving import predict_s


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """As written to the table: milliseconds, blank with a reason where nothing can be predicted."""

    ttft_ms: str = ""
    tpot_ms: str = ""
    reason: str = ""


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """Of a group of points: absolute relative errors, median and 90 % quantile."""

    engine: str
    gpu: str
    mode: str
    points: int
    ttft: tuple[float, float]
    tpot: tuple[float, float]

    def cells(self) -> list[str]:
        """For a table: percentages."""
        shown = [f"{value:.1%}" for value in (*self.ttft, *self.tpot)]
        return [self.engine, self.gpu, self.mode, str(self.points), *shown]

    def shown(self) -> dict[str, object]:
        """For scripts."""
        return {
            "engine": self.engine,
            "gpu": self.gpu,
            "mode": self.mode,
            "points": self.points,
            "ttft_median_error": round(self.ttft[0], 4),
            "ttft_p90_error": round(self.ttft[1], 4),
            "tpot_median_error": round(self.tpot[0], 4),
            "tpot_p90_error": round(self.tpot[1], 4),
        }


def predicted(row: Row, shapes: Shapes, constants: Calibration | None = None) -> Told:
    """What a row's clients would see, or why that cannot be told."""
    try:
        tpot, ttft = predict_s(deployment_of(row, shapes), constants or calibration())
    except ProfileError as error:
        return Told(reason=str(error))
    return Told(ttft_ms=f"{ttft * 1e3:.4f}", tpot_ms=f"{tpot * 1e3:.5f}")


def scores(rows: Sequence[Row], told: Sequence[Told]) -> list[Score]:
    """Errors by engine, GPU and mode, then of all; none when no row states what was measured."""
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row, one in zip(rows, told, strict=True):
        errors = _errors(row, one)
        if errors is not None:
            key = (row.get("backend", ""), row.get("system", ""), row.get("mode", ""))
            groups.setdefault(key, []).append(errors)
    everything = [pair for pairs in groups.values() for pair in pairs]
    named = [(key, groups[key]) for key in sorted(groups)]
    return [score(*item) for item in (*named, (("all", "", ""), everything)) if everything]


def score(key: tuple[str, str, str], errors: Sequence[tuple[float, float]]) -> Score:
    """Of one group; `errors` are (TTFT, TPOT)."""
    ttft, tpot = sorted(e for e, _ in errors), sorted(e for _, e in errors)
    return Score(
        engine=key[0],
        gpu=key[1],
        mode=key[2],
        points=len(errors),
        ttft=(_quantile(ttft, 0.5), _quantile(ttft, 0.9)),
        tpot=(_quantile(tpot, 0.5), _quantile(tpot, 0.9)),
    )


def _errors(row: Row, told: Told) -> tuple[float, float] | None:
    """|predicted / measured - 1| of TTFT and TPOT; None where one of them is not known."""
    measured = [_positive(row, column) for column in ("ttft_ms", "tpot_ms")]
    if told.reason or None in measured:
        return None
    ttft, tpot = (
        abs(float(p) / m - 1) for p, m in zip((told.ttft_ms, told.tpot_ms), measured, strict=True) if m
    )
    return ttft, tpot


def _positive(row: Mapping[str, str], column: str) -> float | None:
    try:
        value = float(row.get(column) or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, between neighbours in a straight line."""
    at = share * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)
