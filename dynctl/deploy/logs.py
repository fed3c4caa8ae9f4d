"""Log files of a run as one stream of lines: whose, when, what. Needs the files alone, no process."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dynctl.errors import UsageError
from dynctl.launchers.last_lines import BLOCK

_ISO = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?\d*(Z|[+-]\d\d:?\d\d)?")
_SHORT = re.compile(r"(?:^|\s)(\d\d)-(\d\d) (\d\d:\d\d:\d\d)(?:[.,](\d+))?")
_LEAD = 64
"""A line's time is looked for in its first characters only."""
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(s|m|h|d)")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SEAT = re.compile(r"(?P<role>[a-z]+)(?:[/-](?P<index>\d+(?:\.\d+)?))?")
ROLES = ("controller", "frontend", "prefill", "decode", "aggregated", "encode", "engine")


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log: `source` is "decode-0" for a process, "decode-0.engine" for its engine."""

    source: str
    path: Path


@dataclass(frozen=True, slots=True)
class Line:
    """One line. `at` is Unix time in seconds, that of the line before when it says none, 0 when none did."""

    at: float
    source: str
    text: str


def log_files(folder: Path, select: str | None = None) -> list[LogFile]:
    """The logs of a run, by name; `select` is ROLE, ROLE/i (or ROLE-i), and takes engines along.

    Raises UsageError for a selection that fits nothing.
    """
    found = (LogFile(path.name.removesuffix(".log"), path) for path in folder.glob("*.log"))
    files = sorted(found, key=lambda file: file.source)
    if select is None:
        return files
    match = _SEAT.fullmatch(select)
    role, index = (match["role"], match["index"]) if match else (select, None)
    chosen = [f for f in files if _fits(f.source, role, index)]
    if not chosen:
        have = ", ".join(f.source for f in files) or "none yet"
        raise UsageError(f"no log of '{select}'", hint=f"there are: {have}; ROLE or ROLE/i chooses")
    return chosen


def is_selection(text: str) -> bool:
    """Whether a word reads as ROLE or ROLE/i rather than as a deployment's name."""
    match = _SEAT.fullmatch(text)
    return match is not None and match["role"] in ROLES


def _fits(source: str, role: str, index: str | None) -> bool:
    if role == "engine":
        return source.endswith(".engine") and (index is None or f"-{index}." in source)
    seat = source.removesuffix(".engine")
    own_role, _, own_index = seat.partition("-")
    if own_role != role:
        return False
    return index is None or own_index == index or own_index.startswith(f"{index}.")


def parse_time(text: str, now: float) -> float:
    """The time a log line says, or 0. A time without a zone is local; one without a year is before `now`."""
    head = text[:_LEAD]
    if (iso := _ISO.search(head)) is not None:
        zone = (iso[4] or "").replace("Z", "+00:00")
        try:
            moment = datetime.fromisoformat(f"{iso[1]}T{iso[2]}{zone}")
        except ValueError:
            return 0.0
        return moment.timestamp() + (float(f"0.{iso[3]}") if iso[3] else 0.0)
    if (short := _SHORT.search(head)) is not None:
        year = time.localtime(now).tm_year
        try:
            moment = datetime.fromisoformat(f"{year}-{short[1]}-{short[2]}T{short[3]}")
        except ValueError:
            return 0.0
        at = moment.timestamp() + (float(f"0.{short[4]}") if short[4] else 0.0)
        return at if at <= now + 86400.0 else moment.replace(year=year - 1).timestamp()
    return 0.0


def parse_since(text: str, now: float) -> float:
    """Unix time of "10m", "1.5h", "90s", "2d" ago, or of an ISO time. Raises UsageError."""
    if (span := _SPAN.fullmatch(text)) is not None:
        return now - float(span[1]) * _UNITS[span[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(f"no time: {text!r}", hint="like 90s, 10m, 2h, 1d or 2026-01-31T12:00:00") from None


class Stamper:
    """Gives each line of one file its time: its own, or that of the line before."""

    def __init__(self, source: str, now: float) -> None:
        self._source = source
        self._now = now
        self._last = 0.0

    def line(self, text: str) -> Line:
        """The next line of the file."""
        self._last = parse_time(text, self._now) or self._last
        return Line(self._last, self._source, text)


def read_lines(file: LogFile, now: float, since: float = 0.0, end: int | None = None) -> Iterator[Line]:
    """The lines of a file from `since` on, up to the byte `end`.

    A file without any times counts as of its last change.
    """
    try:
        changed = file.path.stat().st_mtime
        stream = file.path.open("rb")
    except FileNotFoundError:
        return
    stamper = Stamper(file.source, now)
    position = 0
    with stream:
        for raw in stream:
            position += len(raw)
            if end is not None and position > end:
                return
            line = stamper.line(raw.decode(errors="replace").rstrip("\r\n"))
            if (line.at or changed) >= since:
                yield line


def merged(
    files: Sequence[LogFile], now: float, since: float = 0.0, ends: Mapping[str, int] | None = None
) -> Iterator[Line]:
    """The lines of all files by time, each file's in their order. `ends`: source → byte to stop at."""
    limits = ends or {}
    streams = (_rising(read_lines(f, now, since, limits.get(f.source))) for f in files)
    return heapq.merge(*streams, key=lambda line: line.at)


def _rising(lines: Iterator[Line]) -> Iterator[Line]:
    """The same lines with times that never fall, as merging needs it."""
    highest = 0.0
    for line in lines:
        highest = max(highest, line.at)
        yield Line(highest, line.source, line.text)


class Follower:
    """Reads what is added to log files, whole lines at a time; files that appear later may be added."""

    def __init__(self, now: float) -> None:
        self._now = now
        self._at: dict[str, int] = {}
        self._stampers: dict[str, Stamper] = {}

    def skip(self, file: LogFile) -> int:
        """Start after the whole lines that are there; the byte that comes next."""
        try:
            with file.path.open("rb") as stream:
                size = stream.seek(0, 2)
                position = size
                while position > 0:
                    step = min(BLOCK, position)
                    stream.seek(position - step)
                    found = stream.read(step).rfind(b"\n")
                    if found >= 0:
                        position = position - step + found + 1
                        break
                    position -= step
        except FileNotFoundError:
            position = 0
        self._at[file.source] = position
        return position

    def read(self, files: Sequence[LogFile]) -> list[Line]:
        """The lines added since the last call."""
        found: list[Line] = []
        for file in files:
            found += self._added(file)
        return sorted(found, key=lambda line: line.at)

    def _added(self, file: LogFile) -> list[Line]:
        offset = self._at.get(file.source, 0)
        try:
            size = file.path.stat().st_size
            if size < offset:
                offset = 0
            if size == offset:
                return []
            with file.path.open("rb") as stream:
                stream.seek(offset)
                raw = stream.read()
        except FileNotFoundError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        self._at[file.source] = offset + len(whole)
        stamper = self._stampers.setdefault(file.source, Stamper(file.source, self._now))
        return [stamper.line(text.decode(errors="replace")) for text in whole.splitlines()]
