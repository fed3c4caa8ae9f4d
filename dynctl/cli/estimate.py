"""`dynctl estimate`: TTFT and TPOT of each row of a table of serving points, by the own model."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.render import data, json_data, prose, table
from dynctl.errors import ProfileError
from dynctl.perfmodel.accuracy import Score, Told, predicted, scores
from dynctl.perfmodel.find_shape import find_shape
from dynctl.perfmodel.points import NEEDED, Shapes

_SHOWN_REASONS = 5


def estimate(
    points: Annotated[Path, typer.Argument(metavar="POINTS.csv", help="a row = one load point")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="where the predictions go")],
    json_: options.Json = False,
) -> None:
    """Predict TTFT and TPOT of serving points, without running anything.

    POINTS.csv has a row for each load point: model, system (GPU), backend, mode (agg or disagg), isl, osl,
    concurrency, tp, and where they apply pp, attention_dp, moe_tp, moe_ep, batch, weight_quant, moe_quant and
    prefill_*, decode_*. FILE gets every row with ttft_ms and tpot_ms (milliseconds) as predicted, and a
    reason where that cannot be; other columns are carried over. Where the rows state measured times, the
    errors of the predictions are printed by engine and GPU.

    Example: dynctl estimate points.csv --out predictions.csv
    """
    if out.resolve() == points.resolve():
        raise ProfileError("would be written over the points", where=str(out), hint="another file for --out")
    columns, lines = _read(points)
    shapes = functools.cache(functools.partial(find_shape, environ=os.environ))
    told = [line.told(columns, shapes) for line in lines]
    _write(out, columns, lines, told)
    found = scores([line.row for line in lines], told)
    failed = [(line.number, one.reason) for line, one in zip(lines, told, strict=True) if one.reason]
    if json_:
        json_data(
            {
                "rows": len(lines),
                "predicted": len(lines) - len(failed),
                "errors": [score.shown() for score in found],
                "reasons": [{"line": line, "reason": reason} for line, reason in failed],
            }
        )
        return
    if found:
        data(_table(found))
    for line, reason in failed[:_SHOWN_REASONS]:
        prose(f"{points}:{line}: {reason}", style="warning")
    if len(failed) > _SHOWN_REASONS:
        prose(f"and {len(failed) - _SHOWN_REASONS} more: see the column reason", style="warning")
    prose(f"{len(lines) - len(failed)} of {len(lines)} rows predicted → {out}")


class _Line(msgspec.Struct, frozen=True):
    """A row, where it ends in the file, and how many cells it has."""

    number: int
    row: dict[str, str]
    cells: int

    def told(self, columns: list[str], shapes: Shapes) -> Told:
        """Its prediction, or what is wrong with it."""
        if self.cells != len(columns):
            return Told(reason=f"the row has {self.cells} cells, the header {len(columns)}")
        return predicted(self.row, shapes)


def _read(path: Path) -> tuple[list[str], list[_Line]]:
    """Header and rows, blank lines left out."""
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = next(reader, [])
            lines = [
                _Line(reader.line_num, dict(zip(columns, cells, strict=False)), len(cells))
                for cells in reader
                if cells
            ]
    except OSError as error:
        raise ProfileError(f"cannot read the points: {error.strerror}", where=str(path)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ProfileError(f"not a table of points: {error}", where=str(path), hint="CSV in UTF-8") from error
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise ProfileError(
            f"lacks the columns {', '.join(missing)}",
            where=f"{path}:1",
            hint=f"needed are {', '.join(NEEDED)}",
        )
    return columns, lines


def _write(path: Path, columns: list[str], lines: list[_Line], told: list[Told]) -> None:
    """The rows with the predictions in place of what was measured; the file is there whole or not at all."""
    import csv

    header = [*columns, *(name for name in ("ttft_ms", "tpot_ms", "reason") if name not in columns)]
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
            writer.writeheader()
            for line, one in zip(lines, told, strict=True):
                writer.writerow({**line.row, **msgspec.to_builtins(one)})
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ProfileError(f"cannot write the predictions: {error.strerror}", where=str(path)) from error


def _table(found: list[Score]) -> str:
    headers = ("ENGINE", "GPU", "MODE", "POINTS", "TTFT ERROR", "P90", "TPOT ERROR", "P90")
    return table(headers, [score.cells() for score in found])
