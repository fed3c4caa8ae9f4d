"""planner.jsonl: what was decided, why, and on what figures; one JSON object a line, bounded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dynctl.launchers.files import write_atomic
from dynctl.planner.core import Decision
from dynctl.planner.memory import Interval
from dynctl.planner.observe import Observation

MOST_BYTES = 4 * 1024 * 1024
"""Beyond it, the older half goes."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line. `ts`: Unix time in seconds; `outcome`: what became of it, "" = nothing was to be done.

    `interval`: demand of the interval that had just ended. `boot_s`: what a replica takes until it serves.
    """

    ts: float
    decision: Decision
    observation: Observation
    interval: Interval | None = None
    outcome: str = ""
    boot_s: float = 0.0


def append(path: Path, entry: Entry, most: int = MOST_BYTES) -> None:
    """Add a line, by one write; a journal that has grown too long is cut. Raises OSError."""
    line = msgspec.json.encode(entry) + b"\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, line)
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if size > most:
        kept = path.read_bytes()[-most // 2 :]
        write_atomic(path, kept[kept.find(b"\n") + 1 :])


def read(path: Path) -> list[Entry]:
    """All lines, oldest first; [] without a journal. Lines that are none (half written) are skipped.

    Raises OSError.
    """
    try:
        return list(_entries(path.read_bytes()))
    except FileNotFoundError:
        return []


def _entries(raw: bytes) -> Iterator[Entry]:
    decoder = msgspec.json.Decoder(Entry)
    for line in raw.splitlines():
        try:
            yield decoder.decode(line)
        except msgspec.MsgspecError:
            continue
