"""The four plots of the report: what is drawn, for any matplotlib axes given. No matplotlib is imported here.

Each says in `caption` how it is to be read; colours are those of `palette`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynctl.perfmodel.choice import Choice, Variation
from dynctl.profiler.phrases import milliseconds
from dynctl.profiler.report.curves import curve_of, itl_plot, ttft_plot
from dynctl.profiler.report.front import Mode, Point, front
from dynctl.profiler.report.marks import Plot, empty, label_axes, legend, measured, note, star
from dynctl.profiler.report.palette import LIGHT
from dynctl.profiler.report.told import Told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"isl": "prompts", "osl": "answers", "rate": "rate"}


def plots(told: Told) -> tuple[Plot, ...]:
    """All four, in the order of the page."""
    return (ttft_plot(told), itl_plot(told), front_plot(told), sensitivity_plot(told))


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
        star(axes, predicted.tokens_per_s_per_user, predicted.tokens_per_s_per_gpu, "chosen")
    confirmed = told.confirmed
    if confirmed is not None and confirmed.itl_s and confirmed.output_rate:
        measured(axes, 1 / confirmed.itl_s, confirmed.output_rate / confirmed.option.gpus, "measured whole")
    if not found:
        empty(axes, "no layout can be: nothing to draw")
        return
    users = [*(p.user for p in found), *(o.predicted.tokens_per_s_per_user for o in told.shown())]
    gpus = [*(p.gpu for p in found), *(o.predicted.tokens_per_s_per_gpu for o in told.shown())]
    if confirmed is not None and confirmed.itl_s and confirmed.output_rate:
        users.append(1 / confirmed.itl_s)
        gpus.append(confirmed.output_rate / confirmed.option.gpus)
    reach = max(users) * 1.08
    axes.set_xlim(0, reach)
    axes.set_ylim(0, max(gpus) * 1.1)
    if choice.sla.itl_s is not None:
        _mark_itl(axes, choice.sla.itl_s, reach)
    label_axes(axes, "one user's stream, tokens/s", "answers, tokens/s a GPU")
    legend(axes)


def _mark_itl(axes: Axes, itl_s: float, reach: float) -> None:
    """Where a stream is fast enough. Beyond the axis it is only told: drawn there, it would leave the layout
    no room for the rest.
    """
    least, words = 1.0 / itl_s, f"ITL {milliseconds(itl_s)}"
    if least > reach:
        note(axes, reach, f"{words}: {least:,.0f} tokens/s, further right", along_x=True, before=True)
        return
    axes.axvspan(least, reach, color=LIGHT["band"])
    axes.axvline(least, color=LIGHT["bad"], linewidth=1.2, linestyle="-.")
    note(axes, least, words, along_x=True, before=least > reach / 2)


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
        empty(axes, "nothing to vary")
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
    label_axes(axes, f"GPUs of the best split then (now {choice.chosen.gpus}, dashed line)", "")
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
