"""Load reports, and an engine that falls silent."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from dynctl.engines.base import EngineLoad
from dynctl.errors import DeadlineExceeded
from dynctl.worker import load
from dynctl.worker.readiness import Probe

LOAD = EngineLoad(rank=0, running=1, waiting=0, kv_usage=0.5)


class Scripted:
    """Answers as told: True = a load, False = nothing in time. The last one stays."""

    def __init__(self, *answers: bool) -> None:
        self.answers = list(answers)

    async def load(self) -> list[EngineLoad]:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not answer:
            raise DeadlineExceeded("it did not answer in time", where="engine")
        return [LOAD]


async def watched(probe: Scripted, *, until: int, silent_after_s: float) -> tuple[list[bool], int]:
    """What was told of silence, and how many loads came, until `until` words were told."""
    told: list[bool] = []
    published: list[EngineLoad] = []
    enough = asyncio.Event()

    async def on_silent(silent: bool) -> None:
        told.append(silent)
        if len(told) == until:
            enough.set()

    task = asyncio.create_task(
        load.report_load(cast(Probe, probe), published.append, on_silent, silent_after_s=silent_after_s)
    )
    async with asyncio.timeout(10):
        await enough.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return told, len(published)


async def test_frozen_engine_is_told_once_and_so_is_its_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PERIOD_S", 0.001)
    told, published = await watched(Scripted(True, False, False, False, True), until=2, silent_after_s=0.0)
    assert told == [True, False]
    assert published >= 2


async def test_one_late_answer_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_PERIOD_S", 0.001)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await watched(Scripted(True, False, True), until=1, silent_after_s=5.0)
