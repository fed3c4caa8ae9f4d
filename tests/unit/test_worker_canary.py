"""When an idle engine is asked to generate, and what its silence means."""

from __future__ import annotations

import asyncio

from dynctl.engines.base import EngineLoad
from dynctl.worker.canary import HOLDING, MISSES, RETRY_S, CanaryRun, Watch

INTERVAL = 30.0


def load(usage: float, running: int = 1) -> EngineLoad:
    return EngineLoad(rank=0, running=running, waiting=0, kv_usage=usage)


def test_an_engine_at_work_is_never_asked() -> None:
    watch = Watch(INTERVAL, 0.0)
    for second in range(1000):
        watch.load(load(second / 1000), float(second))
        assert not watch.due(float(second))


def test_an_idle_engine_is_asked_and_again_only_after_another_interval() -> None:
    watch = Watch(INTERVAL, 0.0)
    asked = []
    for second in range(100):
        watch.load(load(0.0, 0), float(second))
        if watch.due(float(second)):
            asked.append(second)
            watch.answered(float(second))
    assert asked == [30, 60, 90]


def test_requests_that_hang_in_the_engine_do_not_pass_for_work() -> None:
    watch = Watch(INTERVAL, 0.0)
    for second in range(int(HOLDING * INTERVAL)):
        watch.load(load(0.5, running=7), float(second))
        assert not watch.due(float(second)), "a long prompt changes little for a while"
    assert watch.due(HOLDING * INTERVAL)


def test_one_miss_is_none_and_two_are_silence() -> None:
    watch = Watch(INTERVAL, 0.0)
    for _ in range(MISSES - 1):
        watch.missed(40.0)
        assert not watch.silent
        assert watch.due(40.0), "the second try follows at once"
    watch.missed(50.0)
    assert watch.silent
    assert not watch.due(50.0)
    assert watch.due(50.0 + RETRY_S)


def test_work_after_a_miss_makes_up_for_it() -> None:
    watch = Watch(INTERVAL, 0.0)
    watch.load(load(0.1), 39.0)
    watch.missed(40.0)
    watch.load(load(0.2), 41.0)
    watch.missed(80.0)
    assert not watch.silent


def test_a_silent_engine_is_asked_on_whatever_its_load_says_until_it_answers() -> None:
    watch = Watch(INTERVAL, 0.0)
    for _ in range(MISSES):
        watch.missed(40.0)
    for second in range(41, 46):
        watch.load(load(second / 100), float(second))
    assert watch.silent
    assert watch.due(45.0)
    watch.answered(45.0)
    assert not watch.silent


async def test_one_silent_rank_is_told_once_and_so_is_its_return() -> None:
    told: list[bool] = []
    hangs = {1}
    asked: list[int | None] = []

    async def asks(rank: int | None) -> str:
        asked.append(rank)
        return "late" if rank in hangs else ""

    async def on_silent(silent: bool) -> None:
        told.append(silent)
        hangs.clear()

    run = CanaryRun(asks, 2, 0.05, on_silent)
    for watch in run._watches:
        watch.due = lambda now_s: True  # type: ignore[method-assign]
    task = asyncio.create_task(run.run())
    async with asyncio.timeout(10):
        while told != [True, False]:  # noqa: ASYNC110 - the run has no event to wait for
            await asyncio.sleep(0.01)
    task.cancel()
    assert set(asked) == {0, 1}


async def test_the_only_rank_goes_without_a_number() -> None:
    asked: list[int | None] = []

    async def asks(rank: int | None) -> str:
        asked.append(rank)
        return ""

    async def on_silent(silent: bool) -> None:
        raise AssertionError("it answered")

    run = CanaryRun(asks, 1, 0.01, on_silent)
    task = asyncio.create_task(run.run())
    async with asyncio.timeout(10):
        while not asked:  # noqa: ASYNC110 - the run has no event to wait for
            await asyncio.sleep(0.01)
    task.cancel()
    assert asked[0] is None
