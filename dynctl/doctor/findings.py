"""What a check has found: ok, or what is wrong and what would help. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Level = Literal["ok", "note", "warn", "fail", "unknown"]
"""`unknown`: it could not be checked, which is said and is no pass. `note`: good to know, nothing to do."""

LEVELS: tuple[Level, ...] = ("fail", "warn", "unknown", "note", "ok")
ALL_HOSTS = ""
"""Instead of a host: the finding is about all of them, or about the recipe."""


class Verdict(NamedTuple):
    """What a judge says of one host; `remedy` is what to do about it, "" = nothing."""

    level: Level
    message: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A verdict with the host it is about and the check it is of."""

    host: str
    check: str
    level: Level
    message: str
    remedy: str = ""


def ok(message: str) -> Verdict:
    """As it should be."""
    return Verdict("ok", message)


def note(message: str, remedy: str = "") -> Verdict:
    """Good to know."""
    return Verdict("note", message, remedy)


def warn(message: str, remedy: str) -> Verdict:
    """It may work, and may not, or slowly."""
    return Verdict("warn", message, remedy)


def fail(message: str, remedy: str) -> Verdict:
    """It will not work."""
    return Verdict("fail", message, remedy)


def unknown(message: str, remedy: str = "") -> Verdict:
    """It could not be checked."""
    return Verdict("unknown", message, remedy)


def findings_of(host: str, check: str, verdicts: Iterable[Verdict]) -> list[Finding]:
    """The verdicts as findings of that host and check."""
    return [Finding(host, check, *verdict) for verdict in verdicts]


def counts(findings: Sequence[Finding]) -> dict[Level, int]:
    """How many of each level, all levels there."""
    return {level: sum(finding.level == level for finding in findings) for level in LEVELS}


def size(amount: float) -> str:
    """Bytes as people say them: "512 MB", "1.5 GB", "12 GB"."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= divisor:
            number = amount / divisor
            return f"{number:.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
    return f"{amount:.0f} bytes"
