"""How late this process's event loop is, and how much of a core it takes: is the client the bottleneck?"""

from __future__ import annotations

import asyncio
import time
from array import array

import msgspec

from dynctl.profiler.load.statistics import quantile

TICK_S = 0.01
BUSY = 0.9
"""A client that takes more of one core than this cannot be trusted to have looked in time."""
LAG_SHARE = 0.05
"""Of what is measured: lag above that share spoils it."""
LEAST_LAG_S = 0.002
"""Timers of the event loop come in milliseconds: less lag than this cannot be told from none."""


class ClientLoad(msgspec.Struct, frozen=True, kw_only=True):
    """Of the client itself: lag of its event loop in seconds, and the share of one core that it took."""

    lag_mean_s: float
    lag_p95_s: float
    lag_p99_s: float
    lag_max_s: float
    cpu: float

    def bottleneck(self, measured_s: float | None) -> str:
        """Why what was measured, of which the finest is `measured_s`, is not to be trusted; "" = it is."""
        if self.cpu > BUSY:
            return f"the client took {self.cpu:.0%} of a core"
        limit_s = max(LEAST_LAG_S, LAG_SHARE * (measured_s or 0.0))
        if self.lag_p95_s > limit_s:
            late_ms, limit_ms = self.lag_p95_s * 1e3, limit_s * 1e3
            return f"the client itself was {late_ms:.1f} ms late (p95; {limit_ms:.1f} ms can be borne)"
        return ""


class LagMeter:
    """Measures while it is entered."""

    def __init__(self) -> None:
        self._lags: array[float] = array("d")
        self._task: asyncio.Task[None] | None = None
        self._begun_s = self._cpu_s = 0.0

    async def __aenter__(self) -> LagMeter:
        self.restart()
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def restart(self) -> None:
        """Forget what was before now: the warm-up."""
        self._lags = array("d")
        self._begun_s, self._cpu_s = time.perf_counter(), time.process_time()

    def result(self) -> ClientLoad:
        """What it was so far."""
        passed_s = max(time.perf_counter() - self._begun_s, 1e-9)
        lags = sorted(self._lags) or [0.0]
        return ClientLoad(
            lag_mean_s=sum(lags) / len(lags),
            lag_p95_s=quantile(lags, 0.95),
            lag_p99_s=quantile(lags, 0.99),
            lag_max_s=lags[-1],
            cpu=(time.process_time() - self._cpu_s) / passed_s,
        )

    async def _tick(self) -> None:
        due_s = time.perf_counter() + TICK_S
        while True:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            now_s = time.perf_counter()
            self._lags.append(max(0.0, now_s - due_s))
            due_s = max(due_s + TICK_S, now_s)
