"""The end of a log, and the lines of it that say what went wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

BLOCK = 65536
_TELLING = re.compile(
    r"\b(error|exception|critical|fatal|refused|denied|cannot|unable|failed|no such|not found|killed)\b"
    r"|Error\b|Exception\b",
    re.IGNORECASE,
)


def tail(path: Path, count: int) -> list[str]:
    """The last `count` lines of a file, without reading all of it; [] when there is none."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2)
            raw = b""
            while end > 0 and raw.count(b"\n") <= count:
                step = min(BLOCK, end)
                end -= step
                file.seek(end)
                raw = file.read(step) + raw
    except OSError:
        return []
    return [line.decode(errors="replace") for line in raw.splitlines()[-count:]]


def telling_lines(lines: Sequence[str], limit: int) -> list[str]:
    """The lines of a log that say what went wrong, oldest first; its last lines when none does."""
    full = [line.rstrip() for line in lines if line.strip()]
    telling = [line for line in full if _TELLING.search(line)]
    return (telling or full)[-limit:]


def first_error(lines: Sequence[str]) -> str:
    """The first line that says what went wrong, "" when there are no lines."""
    return next((line for line in lines if _TELLING.search(line)), lines[0] if lines else "")
