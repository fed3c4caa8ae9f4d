"""What people see: prose on standard error, aligned tables on standard output, colour on terminals only."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any, Literal, TextIO

from dynctl.cli.terminal import wants_colour

Style = Literal["", "error", "warning", "good", "dim", "bold"]

_CODES: dict[str, str] = {"error": "31", "warning": "33", "good": "32", "dim": "2", "bold": "1"}
_LABELS: dict[str, str] = {"error": "error: ", "warning": "warning: "}
STATE_STYLES: dict[str, Style] = {
    "ready": "good",
    "pending": "warning",
    "starting": "warning",
    "waiting": "dim",
    "backoff": "warning",
    "degraded": "warning",
    "draining": "warning",
    "silent": "error",
    "stopping": "warning",
    "lost": "error",
    "failed": "error",
    "stopped": "dim",
}


def paint(text: str, style: Style, *, to: TextIO | None = None) -> str:
    """`text` in a style if `to` (default stdout) shows colours, else as it is."""
    stream = sys.stdout if to is None else to
    if not style or not wants_colour(stream.isatty(), os.environ):
        return text
    return f"\033[{_CODES[style]}m{text}\033[0m"


def prose(text: str, *, style: Style = "") -> None:
    """One message for people, on standard error."""
    label = _LABELS.get(style, "")
    shown = paint(label, style, to=sys.stderr) + text if label else paint(text, style, to=sys.stderr)
    sys.stderr.write(shown + "\n")
    sys.stderr.flush()


def data(text: str) -> None:
    """One piece of data, on standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def json_data(value: Any) -> None:
    """A value as JSON on standard output: indented for a terminal, one line otherwise."""
    data(json.dumps(value, indent=2 if sys.stdout.isatty() else None))


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, state_column: int = -1) -> str:
    """Aligned columns under their headers; `state_column` is coloured by its value. No trailing spaces."""
    widths = [max(len(r[i]) for r in (headers, *rows)) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        last = len(cells) - 1
        shown = []
        for i, cell in enumerate(cells):
            padded = cell if i == last else cell.ljust(widths[i])
            style = STATE_STYLES.get(cell, "") if i == state_column and cells is not headers else ""
            shown.append(paint(padded, style))
        return "  ".join(shown).rstrip()

    head = paint("  ".join(h.ljust(w) for h, w in zip(headers, widths, strict=True)).rstrip(), "dim")
    return "\n".join([head, *(line(row) for row in rows)])


def program() -> str:
    """How to call this dynctl again: "dynctl" when the shell finds this one, else as it was called."""
    called, found = sys.argv[0], shutil.which("dynctl")
    if os.path.basename(called) != "dynctl" or (
        found and os.path.realpath(found) == os.path.realpath(called)
    ):
        return "dynctl"
    return shlex.quote(called)


def counted(number: int, what: str) -> str:
    """How many of what: "1 host", "2 hosts"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def cut(line: str, columns: int) -> str:
    """A line as far as it fits so many columns, with "..." where it does not; 0 = there is no limit."""
    return line if not columns or len(line) <= columns else f"{line[: max(0, columns - 4)]} ..."


def columns_of(stream: TextIO) -> int:
    """How wide the terminal is that a stream goes to; 0 = it goes to none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except (OSError, ValueError):
        return 0


def age(seconds: float) -> str:
    """A time span as people say it: "12s", "3m04s", "2h05m", "3d04h"."""
    whole = max(0, int(seconds))
    minutes, secs = divmod(whole, 60)
    hours, mins = divmod(minutes, 60)
    days, hrs = divmod(hours, 24)
    if days:
        return f"{days}d{hrs:02d}h"
    if hours:
        return f"{hours}h{mins:02d}m"
    return f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"
