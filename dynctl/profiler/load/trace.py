"""Traces of requests, one JSON object a line, as Mooncake's (FAST '25) are."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from dynctl.errors import ProfileError
from dynctl.profiler.load.spec import TraceRequest


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def parse_trace(lines: Iterable[bytes], where: str) -> tuple[TraceRequest, ...]:
    """The requests, by time: `timestamp` in ms, `input_length` and `output_length` in tokens, `hash_ids` an
    id for each block of the prompt. Raises ProfileError with file:line for a line that is none.
    """
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        here = f"{where}:{number}"
        try:
            read = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            hint = "timestamp (ms), input_length, output_length (tokens), hash_ids"
            raise ProfileError(f"not a request of a trace: {error}", where=here, hint=hint) from error
        if read.timestamp < 0 or read.input_length < 1 or read.output_length < 1:
            raise ProfileError("times must not be negative, lengths must be at least 1", where=here)
        request = TraceRequest(
            at_s=read.timestamp / 1000,
            input_tokens=read.input_length,
            output_tokens=read.output_length,
            blocks=tuple(read.hash_ids),
        )
        found.append(request)
    if not found:
        raise ProfileError("the trace holds no requests", where=where)
    return tuple(sorted(found, key=lambda request: request.at_s))


def load_trace(path: Path) -> tuple[TraceRequest, ...]:
    """The requests in a file. Raises ProfileError when it cannot be read or a line is broken."""
    try:
        with path.open("rb") as lines:
            return parse_trace(lines, str(path))
    except OSError as error:
        raise ProfileError(f"cannot read the trace: {error.strerror}", where=str(path)) from error
