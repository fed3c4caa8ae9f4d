"""What is shown of a load: its progress, and what to do next."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from dynctl.cli.bench_view import Progress, headline, next_step, part_done, time_left_s
from dynctl.cli.load_options import Given, load_of
from dynctl.perfmodel.choice import Sla
from dynctl.profiler.load.lag import LagMeter
from dynctl.profiler.load.result import summed_up
from dynctl.profiler.load.run import Watch
from dynctl.profiler.load.spec import Load
from tests.unit.test_load_result import IDLE, record

COUNTED = load_of(Given(requests=90, concurrency=10))
TIMED = load_of(Given(rate=5.0, duration=20.0))


def test_a_load_is_as_far_as_its_number_or_its_time() -> None:
    assert part_done(COUNTED, 50, 1.0) == 0.5
    assert part_done(TIMED, 3, 5.0) == 0.25
    assert part_done(msgspec.structs.replace(COUNTED, turns=2), 50, 1.0) == 0.25
    assert part_done(TIMED, 0, 99.0) == 1.0


def test_the_time_left_is_not_guessed_from_nothing() -> None:
    assert time_left_s(COUNTED, 0, 3.0) is None
    assert time_left_s(COUNTED, 25, 3.0) == pytest.approx(9.0)


def test_off_a_terminal_a_long_load_tells_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def shown() -> None:
        watch = Watch(
            begun_s=time.perf_counter() - 4.5, records=[record(0), record(1, error="x")], in_flight=3
        )
        with Progress(TIMED, "here") as progress:
            progress.show(watch)
            later = time.monotonic() + 20
            monkeypatch.setattr(time, "monotonic", lambda: later)
            progress.show(watch)
            progress.show(watch)

    asyncio.run(shown())
    said = capsys.readouterr().err
    assert said == "here: fitting  2 done, 3 in flight, 1 failed, 15s left\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Given(concurrency=3, seed=1), "3 in flight  512 tokens in  128 out  seed 1"),
        (Given(rate=2.5, seed=1), "2.5 requests/s, Poisson"),
        (Given(rate=2.0, burstiness="0.5", spread=0.25), "2 requests/s, gamma 0.5  512 ± 25% tokens in"),
        (Given(rate=2.0, burstiness="constant"), "2 requests/s, evenly"),
        (Given(shared=100, prefixes=3, turns=2), "100 of them shared by 3  2 turns"),
    ],
)
def test_the_load_in_one_line(given: Given, said: str) -> None:
    assert said in headline("here", load_of(given))


def test_the_warm_up_is_that_of_the_load() -> None:
    assert load_of(Given(concurrency=7)).warmup == 7
    assert load_of(Given(rate=3.0, requests=50)).warmup == 5
    assert load_of(Given(rate=3.0, duration=100.0)).warmup == 30
    assert load_of(Given(warmup=2)).warmup == 2
    assert load_of(Given(rate=3.0)).settle
    assert not load_of(Given(rate=3.0, warmup=7)).settle
    assert not load_of(Given(concurrency=7)).settle


def test_seeds_are_new_unless_given() -> None:
    assert len({load_of(Given()).seed for _ in range(5)}) == 5
    assert load_of(Given(seed=5)).seed == 5


@pytest.mark.parametrize(
    ("sla", "load", "said"),
    [
        (Sla(), COUNTED, "until tokens/s stay"),
        (Sla(), TIMED, "--sla"),
        (Sla(ttft_s=1.0, percentile=0.5), COUNTED, "--rate shows the queueing"),
        (Sla(ttft_s=1.0, percentile=0.5), TIMED, "a higher --rate"),
        (Sla(ttft_s=0.01, percentile=0.5), TIMED, "less load"),
        (Sla(ttft_s=1.0, percentile=0.999), TIMED, "more --requests"),
    ],
)
def test_the_next_step_follows_from_what_was_measured(sla: Sla, load: Load, said: str) -> None:
    changed = msgspec.structs.replace(load, sla=sla, warmup=0, settle=False, ignore_eos=False)
    result = summed_up(changed, [record(n, asked_input=100) for n in range(40)], IDLE)
    assert said in next_step(changed, result)


async def test_a_loop_that_is_held_up_is_seen_to_be_late() -> None:
    async with LagMeter() as meter:
        for _ in range(3):
            await asyncio.sleep(0.012)
            time.sleep(0.08)  # noqa: ASYNC251 - that is what is to be seen
        await asyncio.sleep(0.02)
        assert meter.result().lag_max_s > 0.03
        meter.restart()
        assert meter.result().lag_max_s == 0.0
