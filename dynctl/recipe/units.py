"""Durations and sizes as people write them, in seconds and bytes."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|KiB|MiB|GiB)?", re.IGNORECASE)
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

DURATION_HELP = 'a duration such as "200ms", "20s", "5m", "1h30m" or "04:00:00", or a number of seconds'
SIZE_HELP = 'a size such as "64MiB" or "32KB", or a number of bytes'


def parse_duration(value: object) -> float:
    """Seconds of "200ms", "1h30m", "04:00:00", "1-12:00:00" (days first) or a number. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
        raise ValueError(f"must be {DURATION_HELP}, not {value}")
    text = value.strip() if isinstance(value, str) else ""
    clock = _CLOCK.fullmatch(text)
    if clock:
        days, hours, minutes, seconds_part = (int(g or 0) for g in clock.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds_part)
    parts = _PART.findall(text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise ValueError(f"must be {DURATION_HELP}, not {value!r}")
    return round(sum(float(n) * _SECONDS[u] for n, u in parts), 6)


def parse_size(value: object) -> int:
    """Bytes of "64MiB", "32KB" or a number; KB is 1000, KiB 1024. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not match:
        raise ValueError(f"must be {SIZE_HELP}, not {value!r}")
    return int(float(match.group(1)) * _BYTES[(match.group(2) or "b").lower()])


Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": ["string", "number"], "examples": ["200ms", "20s", "1h30m"]}),
]
"""Seconds."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"type": ["string", "integer"], "examples": ["64MiB", "32KB"]}),
]
"""Bytes."""
