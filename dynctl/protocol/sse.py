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


def last_end(data: bytes | bytearray, start: int = 0) -> int:
    """Where the last whole event of `data` ends, its empty line included; 0 when none ends after `start`."""
    by_lf, by_crlf = data.rfind(b"\n\n", start), data.rfind(b"\n\r\n", start)
    return max(by_lf + 2 if by_lf >= 0 else 0, by_crlf + 3 if by_crlf >= 0 else 0)


def event_data(event: bytes) -> bytes:
    """What one event carries: its `data:` lines; b"" for a comment."""
    if event.startswith(DATA) and event.find(b"\n") >= len(event) - 2:
        return event[len(DATA) :].strip()
    lines = (line[len(DATA) :].strip() for line in event.splitlines() if line.startswith(DATA))
    return b"\n".join(lines)
