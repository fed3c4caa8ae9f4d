"""The four plots of the report: what is drawn, for any matplotlib axes given. No matplotlib is imported here.

Each says in `caption` how it is to be read; colours are those of `palette`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynctl.perfmodel.choice import Choice, Pool, Variation
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile
from dynctl.profiler.outcome import LayoutRun
from dynctl.profiler.phrases import milliseconds, tokens
from dynctl.profiler.report.front import Mode, Point, batches, front
from dynctl.profiler.report.palette import LIGHT, SHADES
from dynctl.profiler.report.told import Told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = 60
_NAMES = {"isl": "prompts", "osl": "answers", "rate": "rate"}
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True, slots=True)
class Plot:
    """`key`: its place in the page; `draw` fills axes."""

    key: str
    title: str
    caption: str
    draw: Callable[[Axes], None]


def plots(told: Told) -> tuple[Plot, ...]:
    """All four, in the order of the page."""
    return (ttft_plot(told), itl_plot(told), front_plot(told), sensitivity_plot(told))


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
        _empty(axes, "no layout can be: nothing to draw")
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
        _star(axes, demand.isl, chosen.predicted.ttft_s * 1000, "chosen")
        top.append(chosen.predicted.ttft_s)
    confirmed = told.confirmed
    if confirmed is not None and confirmed.ttft_s is not None:
        _measured(axes, demand.isl, confirmed.ttft_s * 1000, "measured whole")
        top.append(confirmed.ttft_s)
    _limit(axes, told.choice.sla.ttft_s, told.choice.sla.percentile)
    axes.set_xlim(0, reach)
    axes.set_ylim(0, max(top) * 1.12 * 1000)
    _axes(axes, "prompt (ISL), tokens", "TTFT, ms")
    _legend(axes)


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
        _empty(axes, "no layout can be: nothing to draw")
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
        _star(axes, pool.sequences, chosen.predicted.itl_s * 1000, "chosen")
        top.append(chosen.predicted.itl_s)
    confirmed = told.confirmed
    if confirmed is not None and confirmed.itl_s is not None:
        _measured(axes, pool.sequences, confirmed.itl_s * 1000, "measured whole")
        top.append(confirmed.itl_s)
    _limit(axes, told.choice.sla.itl_s, told.choice.sla.percentile)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0.9, reach * 1.1)
    axes.set_ylim(0, max(top) * 1.12 * 1000)
    _axes(axes, "sequences in the batch of one replica", "ITL, ms")
    _legend(axes)


def nearest(lines: Sequence[float], context: float) -> int:
    """Which of the lines a point belongs to."""
    return min(range(len(lines)), key=lambda i: abs(lines[i] - context))


def front_plot(told: Told) -> Plot:
    """What is to be had at all, and where the choice stands."""
    marks = (
        " Marks: the options at the demand's rate, below the lines for the headroom that the SLA takes."
        if told.choice.chosen
        else ""
    )
    return Plot(
        "front",
        "Throughput against speed: the Pareto front",
        f"Lines: the most that workers full of requests could give, without waits.{marks} "
        "Shaded: fast enough for the SLA's ITL.",
        lambda axes: _draw_front(told, axes),
    )


def _draw_front(told: Told, axes: Axes) -> None:
    choice = told.choice
    styles: tuple[tuple[Mode, str, str, str], ...] = (
        ("aggregated", "together", "-", "s"),
        ("disaggregated", "apart", "--", "o"),
    )
    curves = {layout: curve_of(told, layout) for layout in told.profiles}
    known = {layout: curve for layout, curve in curves.items() if curve is not None}
    found: list[Point] = []
    for mode, colour, dash, marker in styles:
        line = front(mode, known, told.mix, choice.sla.ttft_s)
        line = line or front(mode, known, told.mix, None)
        found.extend(line)
        axes.plot([p.user for p in line], [p.gpu for p in line], dash, color=LIGHT[colour], label=mode)
        mine = [o.predicted for o in told.shown() if o.mode == mode and o.predicted.tokens_per_s_per_gpu]
        axes.plot(
            [p.tokens_per_s_per_user for p in mine],
            [p.tokens_per_s_per_gpu for p in mine],
            marker,
            color=LIGHT[colour],
            markersize=5.5,
        )
    if choice.chosen is not None:
        predicted = choice.chosen.predicted
        _star(axes, predicted.tokens_per_s_per_user, predicted.tokens_per_s_per_gpu, "chosen")
    confirmed = told.confirmed
    if confirmed is not None and confirmed.itl_s and confirmed.output_rate:
        _measured(axes, 1 / confirmed.itl_s, confirmed.output_rate / confirmed.option.gpus, "measured whole")
    if not found:
        _empty(axes, "no layout can be: nothing to draw")
        return
    users = [*(p.user for p in found), *(o.predicted.tokens_per_s_per_user for o in told.shown())]
    gpus = [*(p.gpu for p in found), *(o.predicted.tokens_per_s_per_gpu for o in told.shown())]
    if confirmed is not None and confirmed.itl_s and confirmed.output_rate:
        users.append(1 / confirmed.itl_s)
        gpus.append(confirmed.output_rate / confirmed.option.gpus)
    reach = max(users)
    axes.set_xlim(0, reach * 1.08)
    axes.set_ylim(0, max(gpus) * 1.1)
    if choice.sla.itl_s is not None:
        axes.axvspan(1.0 / choice.sla.itl_s, max(reach * 1.08, 1.0 / choice.sla.itl_s), color=LIGHT["band"])
        axes.axvline(1.0 / choice.sla.itl_s, color=LIGHT["bad"], linewidth=1.2, linestyle="-.")
        _note(axes, 1.0 / choice.sla.itl_s, f"ITL {milliseconds(choice.sla.itl_s)}", along_x=True)
    _axes(axes, "one user's stream, tokens/s", "answers, tokens/s a GPU")
    _legend(axes)


def sensitivity_plot(told: Told) -> Plot:
    """What would change the choice."""
    chosen = told.choice.chosen
    what = f"Does {chosen.label} still keep the SLA" if chosen else "No split keeps the SLA"
    return Plot(
        "sensitivity",
        "If the load were another",
        f"{what}, and which split would then be best, with its GPUs."
        if chosen
        else "No split keeps the SLA as asked, so there is none to vary.",
        lambda axes: _draw_sensitivity(told.choice, axes),
    )


def _draw_sensitivity(choice: Choice, axes: Axes) -> None:
    if choice.chosen is None or not choice.sensitivity:
        _empty(axes, "nothing to vary")
        return
    axes.set_axisbelow(True)
    rows = choice.sensitivity
    sizes = [one.option.gpus for one in rows if one.option]
    reach = max([*sizes, choice.chosen.gpus])
    for row, one in enumerate(rows):
        _bar(axes, row, one, reach)
    axes.axvline(choice.chosen.gpus, color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(rows)), [f"{_NAMES[one.what]} {one.factor - 1:+.0%}" for one in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, reach * 1.25)
    axes.locator_params(axis="x", integer=True)
    _axes(axes, f"GPUs of the best split then (now {choice.chosen.gpus}, dashed line)", "")
    axes.grid(visible=False, axis="y")


def _bar(axes: Axes, row: int, one: Variation, reach: int) -> None:
    colour = LIGHT["good"] if one.holds else LIGHT["bad"]
    if one.option:
        axes.barh(
            row,
            one.option.gpus,
            height=0.62,
            facecolor=LIGHT["band"],
            edgecolor=colour,
            linewidth=1.2,
            hatch="" if one.holds else "///",
        )
    best = one.option.label if one.option else "nothing on these GPUs"
    word = "✓ holds" if one.holds else "✗ misses"
    text = axes.text(
        reach * 0.015,
        row,
        f"{word} · {best}",
        va="center",
        color=colour,
        fontsize="small",
        fontweight="bold",
    )
    text.set_bbox({"facecolor": LIGHT["page"], "edgecolor": "none", "pad": 1.5})


def _star(axes: Axes, x: float, y: float, label: str) -> None:
    """What is predicted: hollow, so that what was measured is seen in it."""
    axes.plot(
        [x],
        [y],
        "*",
        color=LIGHT["page"],
        markeredgecolor=LIGHT["good"],
        markeredgewidth=1.6,
        markersize=15,
        linestyle="none",
        label=label,
        zorder=5,
    )


def _measured(axes: Axes, x: float, y: float, label: str) -> None:
    axes.plot([x], [y], "P", color=LIGHT["ink"], markersize=6, linestyle="none", label=label, zorder=6)


def _limit(axes: Axes, seconds: float | None, percentile: float) -> None:
    if seconds is None:
        return
    axes.axhline(seconds * 1000, color=LIGHT["bad"], linewidth=1.2, linestyle="-.")
    _note(axes, seconds * 1000, f"SLA p{percentile * 100:g} {milliseconds(seconds)}", along_x=False)


def _note(axes: Axes, at: float, text: str, *, along_x: bool) -> None:
    """A few words at the end of a limit's line."""
    place, offset = ((at, 0.03), (4, 0)) if along_x else ((0.0, at), (4, 3))
    axes.annotate(
        text,
        place,
        offset,
        xycoords=axes.get_xaxis_transform() if along_x else axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="left",
        va="bottom",
        color=LIGHT["bad"],
        fontsize="small",
    )


def _axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color=LIGHT["grid"], linewidth=0.7)
    axes.set_axisbelow(True)


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=3,
        frameon=False,
        borderaxespad=0.2,
        columnspacing=1.4,
        handlelength=1.9,
    )


def _empty(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=LIGHT["soft"], transform=axes.transAxes)
