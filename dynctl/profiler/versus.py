"""Two services measured at the same load: which keeps the SLA, at what cost, and how sure that is. Pure."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from dynctl.profiler.load.result import Result
from dynctl.profiler.load.spec import Load, Open
from dynctl.profiler.load.statistics import Estimate, Figure, label

Which = Literal["a", "b", ""]


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two. `units`: GPUs (or workers, where there are none) that it takes, 0 = not known."""

    label: str
    units: int
    unit: str
    result: Result

    @property
    def goodput_per_unit(self) -> Estimate | None:
        """Requests a second within the SLA by GPU."""
        found = self.result.goodput
        if not self.units:
            return None
        low, high = (None if end is None else end / self.units for end in (found.low, found.high))
        return Estimate(value=found.value / self.units, low=low, high=high)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity of both. `better`: whose is, "" where the difference may be chance or is none."""

    name: str
    unit: Literal["s", "1/s", ""]
    a: Estimate | None
    b: Estimate | None
    more_is_better: bool
    better: Which = ""


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict. `needed`: GPUs that each would need for the load's rate within the SLA, None = not known
    (a closed loop has no rate), or that no number of them is enough. `winner` "" = none, for the reason that
    `verdict` gives.
    """

    rows: tuple[Row, ...]
    needed: tuple[int | None, int | None]
    winner: Which
    verdict: str


def compared(load: Load, a: Side, b: Side) -> Comparison:
    """Both sides of one load. A difference counts when it is significant at 95 %: intervals of percentiles
    that do not meet, rates further apart than the root of their squared half-widths.
    """
    judged = label(load.sla.percentile)
    rows = (
        _by_intervals(f"TTFT {judged}", _of(a.result.ttft_s, judged), _of(b.result.ttft_s, judged)),
        _by_intervals(f"TPOT {judged}", _of(a.result.tpot_s, judged), _of(b.result.tpot_s, judged)),
        _by_intervals(f"E2E {judged}", _of(a.result.e2e_s, judged), _of(b.result.e2e_s, judged)),
        _by_halves("tokens/s out", a.result.output_rate, b.result.output_rate),
        _by_halves("goodput", a.result.goodput, b.result.goodput),
        _by_halves(f"goodput per {_unit(a, b)}", a.goodput_per_unit, b.goodput_per_unit),
    )
    needed = (units_needed(load, a), units_needed(load, b))
    winner, verdict = _verdict(a, b, rows[-1], needed)
    return Comparison(rows=rows, needed=needed, winner=winner, verdict=verdict)


def units_needed(load: Load, side: Side) -> int | None:
    """GPUs for the load's rate within the SLA: what it has if it keeps it, else as many more as goodput is
    short of it, taken that it grows evenly.
    """
    if not isinstance(load.arrivals, Open) or not side.units:
        return None
    if side.result.meets in ("yes", ""):
        return side.units
    good = side.goodput_per_unit
    if good is None or not good.value > 0:
        return None
    wanted = load.arrivals.rate * load.sla.percentile
    return max(side.units, math.ceil(wanted / good.value - 1e-9))


def _verdict(a: Side, b: Side, cost: Row, needed: tuple[int | None, int | None]) -> tuple[Which, str]:
    spoiled = [side.label for side in (a, b) if side.result.problems]
    if spoiled:
        return (
            "",
            f"nothing can be said: the measurement of {' and of '.join(spoiled)} is not to be relied on",
        )
    met = (a.result.meets, b.result.meets)
    if met == ("yes", "no"):
        return "a", f"{a.label} keeps the SLA, {b.label} does not"
    if met == ("no", "yes"):
        return "b", f"{b.label} keeps the SLA, {a.label} does not"
    unsure = [side.label for side in (a, b) if side.result.meets == "unsure"]
    if unsure:
        keeps = "keep" if len(unsure) > 1 else "keeps"
        return "", f"whether {' and '.join(unsure)} {keeps} the SLA cannot be told: more --requests would"
    both = {"yes": "both keep the SLA", "no": "neither keeps the SLA", "": "no SLA was given"}[met[0]]
    return _by_cost(a, b, cost, needed, both)


def _by_cost(
    a: Side, b: Side, cost: Row, needed: tuple[int | None, int | None], both: str
) -> tuple[Which, str]:
    if cost.a is None or cost.b is None:
        return "", f"{both}; what they cost is not known: a URL does not tell its GPUs"
    if not cost.better:
        return "", f"{both}; there is no significant difference in goodput per {_unit(a, b)}"
    winner, loser = (a, b) if cost.better == "a" else (b, a)
    high, low = max(cost.a.value, cost.b.value), min(cost.a.value, cost.b.value)
    more = f"{high / low - 1:.0%} more goodput" if low > 0 else "all of the goodput"
    counts = dict(zip((a.label, b.label), needed, strict=True))
    cheaper = ""
    if None not in needed and needed[0] != needed[1]:
        cheaper = f", {counts[winner.label]} of them instead of {counts[loser.label]}"
    return cost.better, f"{both}; {winner.label} gives {more} per {_unit(a, b)}{cheaper}"


def _unit(a: Side, b: Side) -> str:
    return a.unit if a.unit == b.unit else f"{a.unit} or {b.unit}"


def _of(found: Figure | None, name: str) -> Estimate | None:
    return None if found is None else found.percentiles[name]


def _by_intervals(name: str, a: Estimate | None, b: Estimate | None) -> Row:
    better: Which = ""
    if a is not None and b is not None and a.apart_from(b):
        better = "a" if a.value < b.value else "b"
    return Row(name=name, unit="s", a=a, b=b, more_is_better=False, better=better)


def _by_halves(name: str, a: Estimate | None, b: Estimate | None) -> Row:
    better: Which = ""
    if a is not None and b is not None:
        halves = [_half(a), _half(b)]
        if None not in halves and abs(a.value - b.value) > math.hypot(*(half or 0.0 for half in halves)):
            better = "a" if a.value > b.value else "b"
    return Row(name=name, unit="1/s", a=a, b=b, more_is_better=True, better=better)


def _half(found: Estimate) -> float | None:
    return None if found.low is None or found.high is None else (found.high - found.low) / 2
