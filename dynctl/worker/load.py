"""An engine's load, asked for about once a second and reported on change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dynctl.engines.base import EngineLoad
from dynctl.errors import TransportError
from dynctl.protocol.kv_events import LoadReport
from dynctl.worker.readiness import Probe

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_REPEAT_EVERY = 5
"""An unchanged report is repeated every so many rounds, for readers that came later."""


class LoadReports:
    """Decides which reports go out. Pure."""

    def __init__(self, worker: str, incarnation: int) -> None:
        self._worker = worker
        self._incarnation = incarnation
        self._last: dict[int, LoadReport] = {}
        self._round = 0

    def of(self, loads: Sequence[EngineLoad]) -> list[LoadReport]:
        """The reports to send for this round's loads."""
        self._round += 1
        repeat = self._round % _REPEAT_EVERY == 0
        due = []
        for load in loads:
            report = LoadReport(
                worker=self._worker,
                incarnation=self._incarnation,
                rank=load.rank,
                running=load.running,
                waiting=load.waiting,
                kv_usage=load.kv_usage,
                kv_blocks=load.kv_blocks,
                prefix_queries=load.prefix_queries,
                prefix_hits=load.prefix_hits,
                preemptions=load.preemptions,
            )
            if repeat or self._last.get(load.rank) != report:
                due.append(report)
            self._last[load.rank] = report
        return due


async def report_load(probe: Probe, reports: LoadReports, publish: Callable[[LoadReport], None]) -> None:
    """Ask and publish until cancelled. An engine that does not answer is logged once per silence."""
    loop = asyncio.get_running_loop()
    silent = False
    due = loop.time()
    while True:
        try:
            for report in reports.of(await probe.load()):
                publish(report)
            silent = False
        except TransportError as error:
            if not silent:
                logger.warning("load.unheard error=%s", error)
            silent = True
        due = max(due + _PERIOD_S, loop.time())
        await asyncio.sleep(due - loop.time())


async def wait_until_idle(probe: Probe, *, quiet_s: float, deadline_s: float) -> bool:
    """Wait until the engine has had nothing to do for `quiet_s`; False when the deadline passed first.

    An engine that tells no load counts as busy: only the deadline ends the wait.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(deadline_s):
            idle_since = loop.time() if await _idle(probe) else None
            while idle_since is None or loop.time() - idle_since < quiet_s:
                await asyncio.sleep(0.1)
                if not await _idle(probe):
                    idle_since = None
                elif idle_since is None:
                    idle_since = loop.time()
    except TimeoutError:
        return False
    return True


async def _idle(probe: Probe) -> bool:
    try:
        loads = await probe.load()
    except TransportError as error:
        logger.debug("load.unheard error=%s", error)
        return False
    return bool(loads) and not any(load.running or load.waiting for load in loads)
