"""The files of a report: one HTML page that stands alone, and its plots as a picture."""

from __future__ import annotations

from pathlib import Path

from dynctl.errors import ProfileError
from dynctl.profiler.phrases import sla_text
from dynctl.profiler.report.draw import png, svg
from dynctl.profiler.report.page import page
from dynctl.profiler.report.plots import plots
from dynctl.profiler.report.told import Told

HTML = "report.html"
PNG = "report.png"


def write_report(folder: Path, told: Told) -> tuple[list[Path], str]:
    """Write the report into `folder`, made if it is not there. The files, and why there are no plots or "".

    The same `told` gives the same files. Raises OSError.
    """
    drawn = plots(told)
    folder.mkdir(parents=True, exist_ok=True)
    written, missing = [folder / HTML], ""
    try:
        text = page(told, drawn, svg)
        picture = png(drawn, f"{told.name}  ·  {sla_text(told.choice.sla)}")
        _whole(folder / PNG, picture)
        written.append(folder / PNG)
    except ProfileError as error:
        missing = str(error)
        text = page(told, drawn, svg, no_plots=f"No plots: {missing}")
    _whole(folder / HTML, text.encode())
    return written, missing


def _whole(path: Path, content: bytes) -> None:
    """For everybody to read, or not at all. Raises OSError."""
    try:
        path.write_bytes(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
