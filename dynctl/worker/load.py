"""An engine's load, asked for and reported once a second: a reader that came late waits no longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from dynctl.engines.base import EngineLoad
from dynctl.errors import TransportError
from dynctl.protocol.kv_events import LoadReport
from dynctl.worker.readiness import Probe

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
SILENT_AFTER_S = 12.0
"""A busy engine's HTTP server may be late by seconds; one that says nothing for so long gets no requests."""


def report_of(worker: str, incarnation: int, load: EngineLoad) -> LoadReport:
    """What an engine said of one rank, as it travels on the event plane."""
    return LoadReport(
        worker=worker,
        incarnation=incarnation,
        rank=load.rank,
        running=load.running,
        waiting=load.waiting,
        kv_usage=load.kv_usage,
        kv_blocks=load.kv_blocks,
        prefix_queries=load.prefix_queries,
        prefix_hits=load.prefix_hits,
        preemptions=load.preemptions,
    )


async def report_load(
    probe: Probe,
    publish: Callable[[EngineLoad], None],
    on_silent: Callable[[bool], Awaitable[object]],
    *,
    silent_after_s: float = SILENT_AFTER_S,
) -> None:
    """Ask and publish until cancelled. An engine that does not answer is logged once per silence.

    `on_silent(True)` is awaited when nothing was heard for `silent_after_s` (its process may be stopped or
    stuck), `on_silent(False)` when it answers again.
    """
    loop = asyncio.get_running_loop()
    heard = due = loop.time()
    missed = told = False
    while True:
        try:
            loads = await probe.load()
        except TransportError as error:
            if not missed:
                logger.warning("load.unheard error=%s", error)
            missed = True
            if not told and loop.time() - heard >= silent_after_s:
                told = True
                await on_silent(True)
        else:
            for load in loads:
                publish(load)
            missed, heard = False, loop.time()
            if told:
                told = False
                await on_silent(False)
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
