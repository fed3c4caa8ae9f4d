"""events.jsonl: what happened to a run, one JSON object a line, in order, for people and scripts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

Event = dict[str, Any]
"""Keys "ts" (Unix time in seconds) and "event" (noun.verb), then what the event is about."""


def append_event(path: Path, now: float, event: str, **fields: str | int | float) -> None:
    """Add one line; a single write, so lines of several writers do not mix. Raises OSError."""
    line = msgspec.json.encode({"ts": round(now, 3), "event": event, **fields}) + b"\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, line)
    finally:
        os.close(fd)


def read_events(path: Path, offset: int = 0) -> tuple[list[Event], int]:
    """Whole events from a byte offset on, and the offset to read on from.

    A line half written is left for the next time; a line that is no event is skipped.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            raw = file.read()
    except FileNotFoundError:
        return [], offset
    whole = raw[: raw.rfind(b"\n") + 1]
    events = []
    for line in whole.splitlines():
        try:
            event = msgspec.json.decode(line, type=Event)
        except msgspec.MsgspecError:
            continue
        if isinstance(event.get("event"), str):
            events.append(event)
    return events, offset + len(whole)
