"""The plots of what layouts cost: time to first token, time between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dynctl.perfmodel.choice import Pool
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile
from dynctl.profiler.outcome import LayoutRun
from dynctl.profiler.phrases import tokens
from dynctl.profiler.report.front import batches
from dynctl.profiler.report.marks import Plot, empty, label_axes, legend, limit, measured, star
from dynctl.profiler.report.palette import LIGHT, SHADES
from dynctl.profiler.report.told import Told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = 60
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


def curve_of(told: Told, layout: Layout) -> Profile | None:
    """The costs of a layout: as measured, else as estimated."""
    run = run_of(told, layout)
    if run is not None:
        return run.fitted or told.profiles.get(layout) or run.estimated
    return told.profiles.get(layout)


def run_of(told: Told, layout: Layout) -> LayoutRun | None:
    """The candidate of a layout, if it was measured."""
    return next((run for run in told.runs if run.layout == layout), None)


def pools_of(told: Told, *, reading: bool) -> list[Pool]:
    """Of each option the pool that reads prompts, or writes answers; each layout once, the chosen first."""
    found: dict[Layout, Pool] = {}
    for option in told.shown():
        pool = option.pools[0 if reading else -1]
        found.setdefault(pool.layout, pool)
    return list(found.values())


def ttft_plot(told: Told) -> Plot:
    """How long prompts take to be read alone, and what is left of the SLA."""
    layouts = [pool.layout for pool in pools_of(told, reading=True)][:4]
    measured = any(run.prefill for run in told.runs if run.layout in layouts)
    points = " Points: measured, from the fastest to the slowest request." if measured else ""
    star = (
        " Star: the chosen split under its load at the SLA's percentile, waits and KV transfer included."
        if told.choice.chosen
        else ""
    )
    return Plot(
        "ttft",
        "Time to first token over prompt length",
        f"Lines: a prompt read alone by an idle worker.{star}{points}",
        lambda axes: _draw_ttft(told, axes, layouts),
    )


def _draw_ttft(told: Told, axes: Axes, layouts: Sequence[Layout]) -> None:
    demand, chosen = told.choice.demand, told.choice.chosen
    if not layouts:
        empty(axes, "no layout can be: nothing to draw")
        return
    most = max(prompt for prompt, _ in demand.lengths)
    reach = max([1.6 * demand.isl, 1.1 * most, *(p.isl * 1.05 for r in told.runs for p in r.prefill)])
    ends = [reach * i / _STEPS for i in range(_STEPS + 1)]
    top = [told.choice.sla.ttft_s or 0.0]
    for number, layout in enumerate(layouts):
        profile = curve_of(told, layout)
        if profile is None:
            continue
        colour = LIGHT["together"] if number == 0 else LIGHT["soft"]
        times = [(profile.prefill.seconds[0] + profile.prefill_s(0, round(at))) * 1000 for at in ends]
        axes.plot(
            ends,
            times,
            _DASHES[number],
            color=colour,
            linewidth=2.0 if number == 0 else 1.3,
            label=layout.label,
        )
        top.append(times[-1] / 1000)
        run = run_of(told, layout)
        for point in run.prefill if run else ():
            spread = [[(point.seconds - point.low_s) * 1000], [(point.high_s - point.seconds) * 1000]]
            axes.errorbar(
                [point.isl],
                [point.seconds * 1000],
                yerr=spread,
                fmt=_MARKERS[number],
                color=colour,
                markersize=5,
                capsize=2.5,
            )
            top.append(point.high_s)
    if chosen is not None:
        star(axes, demand.isl, chosen.predicted.ttft_s * 1000, "chosen")
        top.append(chosen.predicted.ttft_s)
    confirmed = told.confirmed
    if confirmed is not None and confirmed.ttft_s is not None:
        measured(axes, demand.isl, confirmed.ttft_s * 1000, "measured whole")
        top.append(confirmed.ttft_s)
    limit(axes, told.choice.sla.ttft_s, told.choice.sla.percentile)
    axes.set_xlim(0, reach)
    axes.set_ylim(0, max(top) * 1.12 * 1000)
    label_axes(axes, "prompt (ISL), tokens", "TTFT, ms")
    legend(axes)


def itl_plot(told: Told) -> Plot:
    """What a step costs as the batch and its contexts grow."""
    pools = pools_of(told, reading=False)
    what = f", {pools[0].layout.label}" if pools else ""
    measured = any(run.decode for run in told.runs if pools and run.layout == pools[0].layout)
    chosen = told.choice.chosen
    star = " Star: the chosen split at the SLA's percentile, drawn at its batch limit" if chosen else ""
    if chosen is not None:
        star += ", with the prompts read in between." if chosen.mode == "aggregated" else "."
    return Plot(
        "itl",
        f"Time between tokens over batch and context{what}",
        "Lines: a decode step of one replica by context length, as far as the KV has room."
        f"{star}{' Points: measured.' if measured else ''}",
        lambda axes: _draw_itl(told, axes, pools[0] if pools else None),
    )


def contexts(told: Told, run: LayoutRun | None) -> list[float]:
    """Context lengths worth a line: those that were measured, else around the one in use; four at most."""
    found = sorted({round(point.context) for point in run.decode}) if run else []
    kept: list[float] = []
    for at in found:
        if not kept or at > kept[-1] * 1.25:
            kept.append(float(at))
    if len(kept) > len(SHADES):
        last = len(kept) - 1
        kept = [kept[round(i * last / (len(SHADES) - 1))] for i in range(len(SHADES))]
    return kept or [told.mix.context * factor for factor in (0.5, 1.0, 2.0, 4.0)]


def _draw_itl(told: Told, axes: Axes, pool: Pool | None) -> None:
    profile = curve_of(told, pool.layout) if pool else None
    if pool is None or profile is None:
        empty(axes, "no layout can be: nothing to draw")
        return
    run, chosen = run_of(told, pool.layout), told.choice.chosen
    lines = contexts(told, run)
    limits = profile.limits
    reach = min(limits.sequences if limits else 256, 2 * max(pool.sequences, 32))
    reach = max([reach, *(point.batch for point in (run.decode if run else ()))])
    top = [told.choice.sla.itl_s or 0.0]
    for number, context in enumerate(lines):
        colour = LIGHT[SHADES[number + len(SHADES) - len(lines)]]
        most = min(reach, int(limits.kv_tokens / context)) if limits else reach
        sizes = batches(most)
        times = [profile.decode_s(size, context) * 1000 for size in sizes]
        if sizes:
            axes.plot(
                sizes, times, _DASHES[number], color=colour, linewidth=1.8, label=f"{tokens(context)} tokens"
            )
            top.append(times[-1] / 1000)
        mine = [p for p in (run.decode if run else ()) if nearest(lines, p.context) == number]
        axes.plot(
            [p.batch for p in mine],
            [p.seconds * 1000 for p in mine],
            _MARKERS[number],
            color=colour,
            markersize=5.5,
        )
        top.extend(p.seconds for p in mine)
    if chosen is not None:
        axes.axvline(pool.sequences, color=LIGHT["soft"], linewidth=1.0, linestyle=(0, (1, 2)))
        star(axes, pool.sequences, chosen.predicted.itl_s * 1000, "chosen")
        top.append(chosen.predicted.itl_s)
    confirmed = told.confirmed
    if confirmed is not None and confirmed.itl_s is not None:
        measured(axes, pool.sequences, confirmed.itl_s * 1000, "measured whole")
        top.append(confirmed.itl_s)
    limit(axes, told.choice.sla.itl_s, told.choice.sla.percentile)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0.9, reach * 1.1)
    axes.set_ylim(0, max(top) * 1.12 * 1000)
    label_axes(axes, "sequences in the batch of one replica", "ITL, ms")
    legend(axes)


def nearest(lines: Sequence[float], context: float) -> int:
    """Which of the lines a point belongs to."""
    return min(range(len(lines)), key=lambda i: abs(lines[i] - context))
