"""Recorded requests as a demand: lengths, rate, and how much of the prompts had been seen before.

One JSON object a line, as Mooncake publishes them: `timestamp` in milliseconds, `input_length`,
`output_length`, and `hash_ids`, one for each block of the prompt: equal first ones = an equal beginning.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Demand

_BLOCK_TOKENS = 512
_SHAPE = '{"timestamp": 0, "input_length": 4000, "output_length": 500, "hash_ids": [1, 2]}'


class Line(msgspec.Struct, frozen=True):
    """One request of a trace."""

    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Line]:
    """The requests, in the order of their times. Raises ProfileError that names the first broken line."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"cannot read the trace: {error.strerror}", where=str(path)) from error
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        if raw.strip():
            lines.append(_line(raw, f"{path}:{number}"))
    if not lines:
        raise ProfileError("the trace holds no request", where=str(path), hint=f"one a line: {_SHAPE}")
    return sorted(lines, key=lambda line: line.timestamp)


def _line(raw: bytes, where: str) -> Line:
    try:
        line = msgspec.json.decode(raw, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"no request of a trace: {error}", where=where, hint=_SHAPE) from error
    if line.input_length < 1 or line.output_length < 1:
        raise ProfileError(
            f"{line.input_length} prompt and {line.output_length} answer tokens",
            where=where,
            hint="1 or more",
        )
    if line.timestamp < 0:
        raise ProfileError(f"a time of {line.timestamp:g} ms", where=where, hint="0 or more")
    return line


def demand_of(lines: list[Line], where: str, rate: float | None = None) -> Demand:
    """What they ask for; `rate` instead of their own. Raises ProfileError when they tell none.

    The hit rate is that of a cache without end that all share: the most that routing can reach.
    """
    if rate is None:
        span_s = (lines[-1].timestamp - lines[0].timestamp) / 1000.0
        if span_s <= 0.0:
            raise ProfileError(
                "the trace tells no rate: all its requests come at one time", where=where, hint="give --rate"
            )
        rate = (len(lines) - 1) / span_s
    return Demand(
        rate=rate,
        lengths=tuple((line.input_length, line.output_length) for line in lines),
        hit_rate=hit_rate(lines),
    )


def hit_rate(lines: list[Line]) -> float:
    """Share of all prompt tokens whose block, and all before it, an earlier request had."""
    seen: set[int] = set()
    found = total = 0
    for line in lines:
        total += line.input_length
        known = 0
        for block in line.hash_ids:
            if block not in seen:
                break
            known += _BLOCK_TOKENS
        found += min(known, line.input_length - 1)
        seen.update(line.hash_ids)
    return found / total
