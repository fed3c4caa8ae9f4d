"""How late the event loop is: what every request waits for, whoever is to blame."""

from __future__ import annotations

import asyncio
from typing import Final

from dynctl.http.sweep import next_beat
from dynctl.observability.metrics import Metrics

INTERVAL_S: Final = 0.5
STALL_S: Final = 0.005


class Pulse:
    """Measures from now until `cancel`, `1 / INTERVAL_S` times a second."""

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        self._loop = loop
        self._delay = metrics.histogram("event_loop_delay_seconds")
        self._stalls = metrics.counter("event_loop_stall_total")
        self._due_s = next_beat(loop.time(), INTERVAL_S)
        self._timer = loop.call_at(self._due_s, self._beat)

    def cancel(self) -> None:
        """Measure no more."""
        self._timer.cancel()

    def _beat(self) -> None:
        now_s = self._loop.time()
        late_s = max(0.0, now_s - self._due_s)
        self._delay.observe(late_s)
        if late_s > STALL_S:
            self._stalls.inc()
        self._due_s = next_beat(now_s, INTERVAL_S)
        self._timer = self._loop.call_at(self._due_s, self._beat)
