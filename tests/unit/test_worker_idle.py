"""Waiting for an engine to have nothing left to do, with made-up answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from dynctl.engines.base import EngineLoad
from dynctl.errors import PeerLost
from dynctl.worker.load import wait_until_idle
from dynctl.worker.readiness import Probe

BUSY = [EngineLoad(rank=0, running=1, waiting=0, kv_usage=0.1)]
QUEUED = [EngineLoad(rank=0, running=0, waiting=1, kv_usage=0.1)]
IDLE = [EngineLoad(rank=0, running=0, waiting=0, kv_usage=0.0)]


class Answers(Probe):
    """Gives each answer in turn and repeats the last; None = the engine does not answer."""

    def __init__(self, *answers: Sequence[EngineLoad] | None) -> None:
        self.left = list(answers)
        self.last_came_up_at = 0.0

    async def load(self) -> list[EngineLoad]:
        if len(self.left) == 1 and not self.last_came_up_at:
            self.last_came_up_at = asyncio.get_running_loop().time()
        found = self.left.pop(0) if len(self.left) > 1 else self.left[0]
        if found is None:
            raise PeerLost("away")
        return list(found)


@pytest.mark.parametrize("between", [BUSY, QUEUED, None, []])
async def test_work_that_comes_in_a_pause_starts_the_quiet_time_anew(
    between: Sequence[EngineLoad] | None,
) -> None:
    """A request between two looks, or one that waits, must not be cut short by the quiet before it."""
    probe = Answers(IDLE, between, IDLE)
    assert await wait_until_idle(probe, quiet_s=0.25, deadline_s=20.0)
    assert asyncio.get_running_loop().time() - probe.last_came_up_at >= 0.25


async def test_an_engine_that_stays_busy_ends_the_wait_at_its_deadline() -> None:
    assert not await wait_until_idle(Answers(BUSY), quiet_s=0.0, deadline_s=0.3)


async def test_no_load_told_counts_as_busy() -> None:
    assert not await wait_until_idle(Answers([]), quiet_s=0.0, deadline_s=0.3)
