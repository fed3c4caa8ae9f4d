"""A small generation for an engine that does nothing: its health probe may be fine and it generate nothing.

`Watch` decides when one is due and what it means; `CanaryRun` sends it. None is sent while the engine is at
work: whatever changes in its load between two reports is work. Requests that hang change nothing any more, so
an engine that holds such requests is asked too, but late: a long prompt may not change much either.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from dynctl.engines.base import EngineLoad

logger = logging.getLogger(__name__)

MISSES = 2
"""Missed in a row before the engine counts as silent: one may fall into a pause of the machine."""
RETRY_S = 5.0
HOLDING = 4
"""So many intervals without a change make one that holds requests due."""
_TICK_S = 0.25


class Watch:
    """One rank of an engine. Pure: `now` is given. `silent`: it generates nothing."""

    def __init__(self, interval_s: float, now_s: float) -> None:
        self._interval_s = interval_s
        self._seen: EngineLoad | None = None
        self._due_s = now_s + interval_s
        self._misses = 0
        self.silent = False

    def load(self, load: EngineLoad, now_s: float) -> None:
        """What it reports. A change is a sign of life, unless it is known to be silent."""
        changed, self._seen = self._seen != load, load
        if changed and not self.silent:
            self._misses = 0
            holding = load.running or load.waiting
            self._due_s = now_s + self._interval_s * (HOLDING if holding else 1)

    def due(self, now_s: float) -> bool:
        """Whether to ask it now."""
        return now_s >= self._due_s

    def answered(self, now_s: float) -> None:
        """It has generated a token."""
        self.silent, self._misses = False, 0
        self._due_s = now_s + self._interval_s

    def missed(self, now_s: float) -> None:
        """It has not."""
        self._misses += 1
        self.silent = self.silent or self._misses >= MISSES
        self._due_s = now_s + (RETRY_S if self.silent else 0.0)


Asks = Callable[[int | None], Awaitable[str]]
"""Has a rank (None: there is but one) generate a token; "" when it has, else why not."""


class CanaryRun:
    """Asks an engine's ranks, each on its own. `on_silent(True)` is awaited when the first of them has fallen
    silent, `on_silent(False)` when none is any more.
    """

    def __init__(
        self,
        asks: Asks,
        ranks: int,
        interval_s: float,
        on_silent: Callable[[bool], Awaitable[object]],
    ) -> None:
        now_s = asyncio.get_running_loop().time()
        self._asks = asks
        self._on_silent = on_silent
        self._watches = [Watch(interval_s, now_s) for _ in range(max(1, ranks))]
        self._told = False

    def load(self, load: EngineLoad) -> None:
        """Take a report of the engine's load."""
        if 0 <= load.rank < len(self._watches):
            self._watches[load.rank].load(load, asyncio.get_running_loop().time())

    async def run(self) -> None:
        """Ask whenever it is due, until cancelled."""
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = asyncio.get_running_loop().time()
            due = [rank for rank, watch in enumerate(self._watches) if watch.due(now_s)]
            if due:
                await asyncio.gather(*map(self._ask, due))
                await self._tell()

    async def _ask(self, rank: int) -> None:
        watch, loop = self._watches[rank], asyncio.get_running_loop()
        started_s = loop.time()
        missing = await self._asks(rank if len(self._watches) > 1 else None)
        if missing:
            logger.warning("canary.missed rank=%d why=%s", rank, missing)
            watch.missed(loop.time())
        else:
            logger.debug("canary.answered rank=%d seconds=%.3f", rank, loop.time() - started_s)
            watch.answered(loop.time())

    async def _tell(self) -> None:
        silent = any(watch.silent for watch in self._watches)
        if silent != self._told:
            self._told = silent
            await self._on_silent(silent)
