"""What all plots have in common: a plot, and the marks that mean the same in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynctl.profiler.phrases import milliseconds
from dynctl.profiler.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Plot:
    """`key`: its place in the page; `draw` fills axes."""

    key: str
    title: str
    caption: str
    draw: Callable[[Axes], None]


def star(axes: Axes, x: float, y: float, label: str) -> None:
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


def measured(axes: Axes, x: float, y: float, label: str) -> None:
    """What was measured: filled."""
    axes.plot([x], [y], "P", color=LIGHT["ink"], markersize=6, linestyle="none", label=label, zorder=6)


def limit(axes: Axes, seconds: float | None, percentile: float) -> None:
    """The SLA's line, where it has one."""
    if seconds is None:
        return
    axes.axhline(seconds * 1000, color=LIGHT["bad"], linewidth=1.2, linestyle="-.")
    note(axes, seconds * 1000, f"SLA p{percentile * 100:g} {milliseconds(seconds)}", along_x=False)


def note(axes: Axes, at: float, text: str, *, along_x: bool, before: bool = False) -> None:
    """A few words at the end of a limit's line, to its right; `before`: to its left."""
    place, offset = ((at, 0.03), (-4 if before else 4, 0)) if along_x else ((0.0, at), (4, 3))
    axes.annotate(
        text,
        place,
        offset,
        xycoords=axes.get_xaxis_transform() if along_x else axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right" if before else "left",
        va="bottom",
        color=LIGHT["bad"],
        fontsize="small",
    )


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Names and the grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(visible=True, color=LIGHT["grid"], linewidth=0.7)
    axes.set_axisbelow(True)


def legend(axes: Axes) -> None:
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


def empty(axes: Axes, text: str) -> None:
    """Nothing but a few words."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color=LIGHT["soft"], transform=axes.transAxes)
