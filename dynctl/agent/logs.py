"""What is new in a folder of logs, in answers of bounded size."""

from __future__ import annotations

from pathlib import Path

from dynctl.protocol.agent import LogCall, LogPart, LogReply

ANSWER_BYTES = 4 << 20


def read_logs(folder: Path, call: LogCall) -> LogReply:
    """Whole lines behind the places asked for, of every log there. A log that has shrunk is read anew."""
    parts: list[LogPart] = []
    room = ANSWER_BYTES
    for path in sorted(folder.glob("*.log")):
        source = path.name.removesuffix(".log")
        part = _new_lines(path, source, call, room)
        if part is None:
            continue
        parts.append(part)
        room -= len(part.text)
        if room <= 0:
            return LogReply(parts=parts, more=True)
    return LogReply(parts=parts)


def _new_lines(path: Path, source: str, call: LogCall, room: int) -> LogPart | None:
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            place = call.places.get(source, -1)
            if place < 0:
                place = max(0, size - call.last_bytes)
            elif place > size:
                place = 0
            file.seek(place)
            data = file.read(room)
    except OSError:
        return None  # it went while it was looked for
    whole = data.rfind(b"\n") + 1
    if not whole and len(data) == room:
        whole = len(data)  # one line longer than an answer
    return LogPart(source=source, text=data[:whole], place=place + whole) if whole else None
