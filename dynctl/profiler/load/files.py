"""Results on disk: JSON of the whole, CSV with a row for each request."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from dynctl.errors import ProfileError
from dynctl.launchers.files import write_atomic
from dynctl.perfmodel.choice import Sla
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.result import meets_sla
from dynctl.profiler.load.spec import Load, Replay

COLUMNS = (
    "number",
    "turn",
    "warmup",
    "due_s",
    "sent_s",
    "ttft_s",
    "tpot_s",
    "e2e_s",
    "asked_input_tokens",
    "input_tokens",
    "cached_tokens",
    "asked_output_tokens",
    "output_tokens",
    "finish",
    "meets_sla",
    "error",
)
"""Blank where there is nothing to tell. Times in seconds; `due_s` and `sent_s` from the start of the load."""


def csv_text(records: Iterable[Record], load: Load) -> str:
    """A header and a row for each request, by number."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in sorted(records, key=lambda one: (one.number, one.turn)):
        writer.writerow(_row(record, load.warmup, load.sla))
    return file.getvalue()


def load_object(load: Load) -> dict[str, Any]:
    """A load as JSON has it; of a trace only how many requests it holds."""
    arrivals = load.arrivals
    found: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(load, arrivals=_without(arrivals)))
    if isinstance(arrivals, Replay):
        found["arrivals"]["requests"] = len(arrivals.requests)
    return found


def writable(path: Path) -> None:
    """Raises ProfileError when a file cannot be written there: better before a load than after it."""
    if not path.parent.is_dir():
        raise ProfileError("there is no such directory", where=str(path.parent))
    if path.is_dir():
        raise ProfileError("it is a directory, not a file", where=str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ProfileError("it may not be written", where=str(path))


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all, a device or pipe as it is. Raises ProfileError: a full disk."""
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
        else:
            write_atomic(path, text)
    except OSError as error:
        raise ProfileError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _row(record: Record, warmup: int, sla: Sla) -> list[object]:
    came = bool(record.times)
    tpot_s = record.tpot_s if came else None
    return [
        record.number,
        record.turn,
        int(record.number < warmup),
        _digits(record.due_s),
        _digits(record.sent_s),
        _digits(record.ttft_s if came else None),
        _digits(tpot_s),
        _digits(record.e2e_s if came else None),
        record.asked_input,
        record.input_tokens or "",
        "" if record.cached_tokens is None else record.cached_tokens,
        record.asked_output,
        record.output_tokens or "",
        record.finish,
        int(meets_sla(record, sla)),
        "interrupted" if record.interrupted else record.error,
    ]


def _digits(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.6f}"


def _without(arrivals: object) -> object:
    return msgspec.structs.replace(arrivals, requests=()) if isinstance(arrivals, Replay) else arrivals
