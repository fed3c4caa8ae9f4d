"""Limits of the HTTP edge."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, times in seconds. `header_timeout_s` and `body_timeout_s` bound a whole head and body.

    `idle_timeout_s` bounds a kept-alive connection without a request, and how long a client may take nothing
    of an answer while its buffer is full.
    """

    header_bytes: int = 32 * 1024
    body_bytes: int = 64 * 1024 * 1024
    header_timeout_s: float = 10.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 75.0
    max_connections: int = 8192

    def sweep_interval_s(self) -> float:
        """How often deadlines are looked at: a quarter of the shortest, between 10 ms and 1 s."""
        return min(1.0, max(0.01, min(self.header_timeout_s, self.body_timeout_s, self.idle_timeout_s) / 4))
