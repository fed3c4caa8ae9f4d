"""Reading the Prometheus text format, as far as load needs it. Pure.

Contract: https://prometheus.io/docs/instrumenting/exposition_formats/ (text format 0.0.4).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: a name, its labels and its value."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(text: bytes, names: Iterable[str]) -> Iterator[Sample]:
    """The samples of the metrics called `names`. Lines that are no sample, NaN and infinities are skipped."""
    wanted = frozenset(names)
    for line in text.decode("utf-8", "replace").splitlines():
        match = _SAMPLE.match(line)
        if match is None or match.group(1) not in wanted:
            continue
        try:
            value = float(match.group(3))
        except ValueError:
            continue
        if isfinite(value):
            labels = {k: _ESCAPE.sub(_unescape, v) for k, v in _LABEL.findall(match.group(2) or "")}
            yield Sample(match.group(1), labels, value)


def _unescape(match: re.Match[str]) -> str:
    return "\n" if match.group(1) == "n" else match.group(1)


def whole(text: str) -> int:
    """A label's value as a number that is not negative; 0 when it is none ("None", "")."""
    return int(text) if text.isascii() and text.isdigit() else 0
