"""One periodic look at many deadlines, instead of one timer each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


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
        self._handle = self._loop.call_later(interval_s, self._tick)

    def stop(self) -> None:
        """Look no more."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _tick(self) -> None:
        self._handle = self._loop.call_later(self._interval_s, self._tick)
        if not self._look(self._loop.time()):
            self.stop()
