"""Server-sent events as OpenAI's API streams them: `data: JSON` each, at last `data: [DONE]`. Pure.

What relays tokens (`frontend.stream`) looks at bytes only; all else reads and writes events by this.
"""

from __future__ import annotations

import re

import msgspec

DATA = b"data:"
DONE = b"[DONE]"
"""What the last event carries."""
LAST_EVENT = b"data: [DONE]\n\n"
_END = re.compile(rb"\n\r?\n")


def event(value: object) -> bytes:
    """One event that carries a value as JSON."""
    return framed(msgspec.json.encode(value))


def framed(data: bytes) -> bytes:
    """One event that carries these bytes, which hold no line feed."""
    return b"data: " + data + b"\n\n"


def split_events(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole events in `data`, each with its empty line, and what is left over."""
    events: list[bytes] = []
    start = 0
    for end in _END.finditer(data):
        events.append(data[start : end.end()])
        start = end.end()
    return events, data[start:]


def event_data(event: bytes) -> bytes:
    """What one event carries: its `data:` lines; b"" for a comment."""
    if event.startswith(DATA) and event.find(b"\n") >= len(event) - 2:
        return event[len(DATA) :].strip()
    lines = (line[len(DATA) :].strip() for line in event.splitlines() if line.startswith(DATA))
    return b"\n".join(lines)
