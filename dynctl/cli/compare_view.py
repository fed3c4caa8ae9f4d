"""How a comparison is shown."""

from __future__ import annotations

from dynctl.cli.bench_view import sla_words
from dynctl.cli.render import table
from dynctl.cli.top_view import duration
from dynctl.profiler.load.spec import Load, Open
from dynctl.profiler.load.statistics import Estimate
from dynctl.profiler.versus import Comparison, Row, Side

_NONE = "-"


def table_of(load: Load, a: Side, b: Side, found: Comparison) -> str:
    """Both sides and whether they differ."""
    rows = [[row.name, _cell(row, row.a), _cell(row, row.b), _difference(row)] for row in found.rows]
    rows.append(
        [f"{a.unit}s" if a.unit == b.unit else "units", str(a.units or _NONE), str(b.units or _NONE), ""]
    )
    if isinstance(load.arrivals, Open) and a.result.meets:
        needed = [_NONE if count is None else str(count) for count in found.needed]
        rows.append([f"needed for {load.arrivals.rate:g}/s", *needed, ""])
    if a.result.meets:
        rows.insert(0, [sla_words(load.sla), _met(a), _met(b), ""])
    return table(("", f"A {a.label}", f"B {b.label}", "DIFFERENCE"), rows)


def _met(side: Side) -> str:
    said = {"yes": "met", "no": "not met", "unsure": "unsure", "": _NONE}[side.result.meets]
    return f"{said}, {side.result.attainment.value:.1%}"


def _cell(row: Row, found: Estimate | None) -> str:
    if found is None:
        return _NONE
    spread = ""
    if found.low is not None and found.high is not None:
        half = (found.high - found.low) / 2
        spread = f" ± {duration(half) if row.unit == 's' else f'{half:.3g}'}"
    return (duration(found.value) if row.unit == "s" else f"{found.value:.4g}") + spread


def _difference(row: Row) -> str:
    if row.a is None or row.b is None:
        return _NONE
    if not row.better:
        return "none that is significant"
    high, low = max(row.a.value, row.b.value), min(row.a.value, row.b.value)
    which, what = row.better.upper(), "more" if row.more_is_better else "faster"
    if low <= 0:
        return f"{which} is {what}"
    if high < 2 * low:
        return f"{which} is {high / low - 1:.0%} {what}"
    return f"{which} is {high / low:.1f} times as {'much' if row.more_is_better else 'fast'}"
