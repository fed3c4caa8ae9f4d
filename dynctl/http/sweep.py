"""One periodic look at many deadlines, instead of one timer each."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


def next_beat(now_s: float, interval_s: float) -> float:
    """When the loop's clock is next a multiple of `interval_s`: what looks at the same beat shares a wake-up.

    One that is less than a hundredth of the interval away is taken to be now.
    """
    return (math.floor(now_s / interval_s + 0.01) + 1) * interval_s


class Sweeper:
    """Calls `look(now)` every interval until it returns False or `stop` is called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, look: Callable[[float], bool]) -> None:
        self._loop = loop
        self._look = look
        self._interval_s = 1.0
        self._handle: asyncio.TimerHandle | None = None

    def ensure(self, interval_s: float) -> None:
        """Look at least every `interval_s` from now on; a shorter interval already running is kept."""
        if self._handle is not None:
            if interval_s >= self._interval_s:
                return
            self._handle.cancel()
        self._interval_s = interval_s
        self._handle = self._loop.call_at(next_beat(self._loop.time(), interval_s), self._tick)

    def stop(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        now_s = self._loop.time()
        self._handle = self._loop.call_at(next_beat(now_s, self._interval_s), self._tick)
        if not self._look(now_s):
            self.stop()
