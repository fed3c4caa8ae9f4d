"""Plots as SVG for a page and as one PNG, by matplotlib, which is imported only here and only when asked for.

The same plots give the same bytes with the same matplotlib.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dynctl.errors import ProfileError
from dynctl.profiler.report.marks import Plot
from dynctl.profiler.report.palette import LIGHT, as_variables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIZE = (5.9, 4.0)
_DPI = 150
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "legend.fontsize": 8.5,
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["ink"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "hatch.linewidth": 0.6,
}


def svg(plot: Plot) -> str:
    """One plot as an <svg> element, its ids its own, its colours CSS variables, its text text.

    Raises ProfileError when matplotlib is not installed.
    """
    with _styled(plot.key) as figure:
        plot.draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{plot.key}-", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1
    )
    return as_variables(text.replace("xlink:href", "href"))


def png(plots: Sequence[Plot], heading: str) -> bytes:
    """All plots in one picture, under a heading. Raises ProfileError when matplotlib is not installed."""
    with _styled("png", scale=2) as figure:
        figure.suptitle(heading, fontsize=12, fontweight="bold", color=LIGHT["ink"])
        parts = figure.subfigures(-(-len(plots) // 2), 2, squeeze=False, wspace=0.03, hspace=0.04).flat
        for part, plot in zip(parts, plots, strict=False):
            part.suptitle(plot.title, x=0.01, ha="left", fontsize=10.5, color=LIGHT["ink"])
            plot.draw(part.add_subplot())
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=_DPI, facecolor=LIGHT["page"], metadata={"Software": None})
    return out.getvalue()


@contextmanager
def _styled(salt: str, scale: int = 1) -> Iterator[Figure]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProfileError("matplotlib is not installed", hint="pip install 'dynctl[profile]'") from error
    style: Any = dict(matplotlib.rcParamsDefault)  # not what the user's own matplotlibrc says
    style.update({**_STYLE, "svg.hashsalt": salt, "backend": "agg"})
    with matplotlib.rc_context(style):
        yield Figure(figsize=(_SIZE[0] * scale, _SIZE[1] * scale), layout="constrained")
