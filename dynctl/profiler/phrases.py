"""Figures of a profiling in words, the same in the terminal and in the report."""

from __future__ import annotations

from dynctl.perfmodel.choice import Demand, Sla


def milliseconds(seconds: float) -> str:
    """8.6ms, 231ms, 2.26s."""
    if seconds >= 1:
        return f"{seconds:.3g}s"
    return f"{seconds * 1000:.0f}ms" if seconds >= 0.1 else f"{seconds * 1000:.1f}ms"


def sla_text(sla: Sla) -> str:
    """p95 TTFT ≤ 200ms, ITL ≤ 20ms."""
    asked = [("TTFT", sla.ttft_s), ("ITL", sla.itl_s)]
    limits = [f"{name} ≤ {milliseconds(value)}" for name, value in asked if value is not None]
    return f"p{sla.percentile * 100:g} {', '.join(limits)}"


def demand_text(demand: Demand) -> str:
    """12.5 requests/s of 4000 prompt and 500 answer tokens, 20% of the prompts cached."""
    rate = f"{demand.rate:.3g} requests/s" if demand.rate else "requests at any rate"
    cached = f", {demand.hit_rate:.0%} of the prompts cached" if demand.hit_rate else ""
    return f"{rate} of {demand.isl:.0f} prompt and {demand.osl:.0f} answer tokens{cached}"


def figure(value: float) -> str:
    """Three digits: 0.739, 5.50, 31.0, 1,234."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def tokens(value: float) -> str:
    """500, 4.25k, 131k tokens, the unit left out."""
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.3g}k"


def span(seconds: float) -> str:
    """0.4 s, 42 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
