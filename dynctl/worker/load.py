"""An engine's load, asked for and reported once a second: a reader that came late waits no longer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dynctl.engines.base import EngineLoad
from dynctl.errors import TransportError
from dynctl.protocol.kv_events import LoadReport
from dynctl.worker.readiness import Probe

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0


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


async def report_load(probe: Probe, publish: Callable[[EngineLoad], None]) -> None:
    """Ask and publish until cancelled. An engine that does not answer is logged once per silence."""
    loop = asyncio.get_running_loop()
    silent = False
    due = loop.time()
    while True:
        try:
            for load in await probe.load():
                publish(load)
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
