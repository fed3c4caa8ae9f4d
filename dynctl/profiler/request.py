"""What is asked of a profiling, from flags and recipe: service level and demand, checked."""

from __future__ import annotations

import math
from pathlib import Path

from dynctl.errors import UsageError
from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.trace import load_trace
from dynctl.profiler.traces import demand_of
from dynctl.recipe.schema import Sla as WrittenSla
from dynctl.recipe.units import parse_duration

_FORM = "ttft=200ms,itl=20ms,percentile=p95"


def sla_of(text: str, written: WrittenSla | None) -> Sla:
    """What --sla says over what the recipe says. Raises UsageError when neither says anything."""
    found: dict[str, float | None] = {}
    if written is not None:
        found = {"ttft": written.ttft, "itl": written.itl, "percentile": _share(written.percentile)}
    given: set[str] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in ("ttft", "itl", "percentile") or not equals:
            raise UsageError(f"--sla: {part!r} is not understood", hint=f"as in {_FORM}")
        if name in given:
            raise UsageError(f"--sla: {name} is given twice", hint=f"as in {_FORM}")
        given.add(name)
        found[name] = _share(value) if name == "percentile" else _seconds(name, value)
    if found.get("ttft") is None and found.get("itl") is None:
        raise UsageError("no service level is given", hint=f"--sla {_FORM}, or sla: in the recipe")
    for name in ("ttft", "itl"):
        if found.get(name) == 0:
            raise UsageError(f"--sla: {name} must be above 0")
    return Sla(ttft_s=found.get("ttft"), itl_s=found.get("itl"), percentile=found.get("percentile") or 0.95)


def _seconds(name: str, value: str) -> float:
    if value.replace(".", "", 1).isdigit():
        raise UsageError(f"--sla: {name} needs a unit: {value}ms or {value}s?", hint=f"as in {_FORM}")
    try:
        return parse_duration(value.replace(" ", ""))
    except ValueError as error:
        raise UsageError(f"--sla: {name} {error}", hint=f"as in {_FORM}") from error


def _share(value: str) -> float:
    try:
        share = float(value.removeprefix("p")) / 100.0
    except ValueError:
        share = 0.0
    if not 0.01 <= share < 1.0:
        raise UsageError(f"--sla: percentile must be such as p50, p95 or p99.9, not {value!r}")
    return share


def demand_from(
    lengths: tuple[int | None, int | None], trace: Path | None, rate: float | None, hit_rate: float | None
) -> Demand:
    """The demand that --isl and --osl, or --trace, and --rate tell; a rate of 1 when none is told.

    Raises UsageError for figures that cannot be, ProfileError for the trace.
    """
    isl, osl = lengths
    if rate is not None and not (math.isfinite(rate) and rate > 0.0):
        raise UsageError(f"--rate must be above 0, not {rate:g}")
    if hit_rate is not None and not 0.0 <= hit_rate < 1.0:
        raise UsageError(f"--hit-rate must be from 0 to below 1, not {hit_rate:g}")
    if trace is not None:
        if isl is not None or osl is not None:
            raise UsageError("--trace tells the lengths: leave --isl and --osl out")
        demand = demand_of(load_trace(trace), str(trace), rate)
        if hit_rate is None:
            return demand
        return Demand(rate=demand.rate, lengths=demand.lengths, hit_rate=hit_rate)
    for name, value in (("isl", isl), ("osl", osl)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be 1 or more tokens, not {value}")
    return Demand(rate=rate or 1.0, lengths=((isl or 4000, osl or 500),), hit_rate=hit_rate or 0.0)
