"""What a profile run has measured, as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from dynctl.cli.render import age, paint, table
from dynctl.profiler.outcome import Confirmed, LayoutRun, Measurement
from dynctl.profiler.phrases import milliseconds

_NONE = "-"


def measured_lines(found: Measurement) -> Iterator[str]:
    """All of it, after the choice."""
    yield ""
    yield paint("measured", "bold")
    rows = [_layout(run, found.choice.sla.itl_s) for run in found.layouts]
    yield table(("LAYOUT", "PROMPT: TIME", "ANSWERS: STEP", "MOST IN ITL", "START", ""), rows)
    for run in found.layouts:
        yield from (f"  {run.layout.label}: {line}" for line in run.lines)
        yield from (f"  {run.layout.label} {one.what} refused: {one.reason}" for one in run.refused)
    if found.rounds:
        yield ""
        yield paint("tried whole, predicted → measured", "bold")
        heads = ("SPLIT", "REQ/S", "REQUESTS", "TTFT", "ITL", "IN SLA", "GOODPUT")
        yield table(heads, [_round(one) for one in found.rounds])
        yield from (f"  {one.option.label}: {one.failure}" for one in found.rounds if one.failure)
        yield from (f"  {one.option.label}: {problem}" for one in found.rounds for problem in one.problems)
    yield ""
    yield (
        f"{found.probes} probes now, {found.reused} of earlier runs, {age(found.took_s)}, "
        f"{found.gpu_s / 3600:.2g} GPU-hours"
    )


def _layout(run: LayoutRun, itl_s: float | None) -> list[str]:
    prompts = ", ".join(f"{p.isl:.0f}: {milliseconds(p.seconds)}" for p in run.prefill)
    ordered = sorted(run.decode, key=lambda one: (one.batch, one.context))
    answers = ", ".join(f"{p.batch}: {milliseconds(p.seconds)}" for p in ordered)
    within = [p.batch for p in run.decode if itl_s is None or p.seconds <= itl_s]
    start = age(run.start_s) if run.start_s else _NONE
    most = str(max(within)) if within else _NONE
    return [run.layout.label, prompts or _NONE, answers or _NONE, most, start, run.failure or run.stopped]


def _round(one: Confirmed) -> list[str]:
    predicted = one.option.predicted

    def both(expected: float, was: float | None) -> str:
        return f"{milliseconds(expected)} → {milliseconds(was) if was is not None else _NONE}"

    share = _NONE
    if one.attainment is not None:
        share = f"{one.attainment:.1%}"
        if one.attainment_low is not None and one.attainment_high is not None:
            share += f" ({one.attainment_low:.0%} to {one.attainment_high:.0%})"
    goodput = f"{one.goodput:.3g}" if one.goodput is not None else _NONE
    times = [both(predicted.ttft_s, one.ttft_s), both(predicted.itl_s, one.itl_s)]
    return [one.option.label, f"{one.rate:.3g}", str(one.requests or _NONE), *times, share, goodput]
