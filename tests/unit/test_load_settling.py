"""A warm-up that is over before batches are full, or that never ends."""

from __future__ import annotations

from array import array

import pytest

from dynctl.profiler.load.record import Record
from dynctl.profiler.load.settling import Settling
from dynctl.profiler.load.spec import Load, Open


def sent(load: Load, stay_s: float, slower: float = 0.0) -> tuple[Settling, int]:
    """All requests of a load, ten a second, each there for `stay_s`, and `slower` for every second before."""
    settling, records, rate = Settling(load), list[Record](), 10.0
    for number in range(100_000):
        at_s = number / rate
        if load.duration_s and at_s > load.duration_s:
            break
        done = [one for one in records if one.end_s <= at_s]
        if not settling.due(number, at_s, done):
            break
        end_s = at_s + stay_s + slower * at_s
        record = Record(number=number, due_s=at_s, sent_s=at_s, asked_input=1, asked_output=1, end_s=end_s)
        record.times = array("d", [end_s])
        records.append(record)
    return settling, len(records)


def load(**values: object) -> Load:
    return Load(arrivals=Open(rate=10.0), settle=True, **values)  # type: ignore[arg-type]


def test_nothing_counts_until_the_load_has_lasted_twice_as_long_as_a_request() -> None:
    found, number = sent(load(requests=200, warmup=20), stay_s=4.99)
    assert (found.warmup, found.cut, number) == (100, False, 300)


def test_a_quick_service_is_warm_after_a_tenth() -> None:
    assert sent(load(requests=200, warmup=20), stay_s=0.1)[0].warmup == 20


def test_a_service_that_gets_ever_slower_is_told_of_after_a_minute() -> None:
    found, _ = sent(load(requests=200, warmup=20), stay_s=1.0, slower=2.0)
    assert (found.warmup, found.cut) == (600, True)


@pytest.mark.parametrize(("stay_s", "warmup", "cut"), [(1.99, 40, False), (30.0, 150, True)])
def test_half_of_the_time_at_most_goes_by(stay_s: float, warmup: int, cut: bool) -> None:
    found, _ = sent(load(duration_s=30.0), stay_s)
    assert (found.warmup, found.cut) == (warmup, cut)


def test_what_was_asked_for_is_kept_to() -> None:
    found, number = sent(Load(arrivals=Open(rate=10.0), requests=50, warmup=3), stay_s=4.99)
    assert (found.warmup, number) == (3, 53)
