"""Two services beside each other: who wins, and when nobody does."""

from __future__ import annotations

import random
from array import array

import msgspec
import pytest

from dynctl.cli.compare_view import table_of
from dynctl.perfmodel.choice import Sla
from dynctl.profiler.load.lag import ClientLoad
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.result import summed_up
from dynctl.profiler.load.spec import Closed, Lengths, Load, Open
from dynctl.profiler.versus import Side, compared, units_needed

LOAD = Load(
    arrivals=Open(rate=10),
    requests=400,
    isl=Lengths(tokens=100),
    osl=Lengths(tokens=2),
    sla=Sla(ttft_s=0.2),
)
IDLE = ClientLoad(lag_mean_s=0.0, lag_p95_s=0.0, lag_p99_s=0.0, lag_max_s=0.0, cpu=0.1)


def side(
    name: str, gpus: int, ttft_s: float, *, load: Load = LOAD, missing: int = 0, broken: int = 0
) -> Side:
    """TTFT around `ttft_s`; of each ten requests `missing` take a second."""
    rng = random.Random(name)
    records = []
    for number in range(400):
        sent_s = number / 10
        wait_s = 1.0 if number % 10 < missing else ttft_s * rng.uniform(0.8, 1.2)
        times = array("d", [sent_s + wait_s, sent_s + wait_s + 0.05])
        records.append(
            Record(
                number=number,
                due_s=sent_s,
                sent_s=sent_s,
                end_s=times[-1],
                times=times,
                asked_input=100,
                asked_output=2,
                input_tokens=100,
                output_tokens=2,
                counted=True,
                error="broke" if number < broken else "",
            )
        )
    return Side(label=name, units=gpus, unit="GPU", result=summed_up(load, records, IDLE))


def test_who_keeps_the_sla_wins_over_who_does_not() -> None:
    good, bad = side("good", 8, 0.1), side("bad", 4, 0.1, missing=4)
    assert (compared(LOAD, good, bad).winner, compared(LOAD, bad, good).winner) == ("a", "b")
    assert compared(LOAD, good, bad).verdict == "good keeps the SLA, bad does not"


def test_of_two_that_keep_it_the_cheaper_wins() -> None:
    found = compared(LOAD, side("large", 8, 0.1), side("small", 4, 0.1))
    assert (found.winner, found.needed) == ("b", (8, 4))
    assert "both keep the SLA; small gives 100% more goodput per GPU, 4 of them instead of 8" in found.verdict


def test_alike_ones_do_not_differ() -> None:
    found = compared(LOAD, side("one", 4, 0.1), side("two", 4, 0.1))
    assert found.winner == ""
    assert "no significant difference in goodput per GPU" in found.verdict
    assert not any(row.better for row in found.rows)


def test_a_faster_one_is_told_by_its_percentile() -> None:
    found = compared(LOAD, side("fast", 4, 0.05), side("slow", 4, 0.15))
    assert found.rows[0].better == "a"
    shown = table_of(LOAD, side("fast", 4, 0.05), side("slow", 4, 0.15), found)
    assert "A is 3.0 times as fast" in shown
    assert "none that is significant" in shown
    assert "TTFT ≤ 200ms for 95%  met, 100.0%" in shown


def test_neither_keeps_it_and_the_nearer_one_costs_less() -> None:
    found = compared(LOAD, side("near", 4, 0.1, missing=2), side("far", 4, 0.1, missing=8))
    assert found.winner == "a"
    assert found.verdict.startswith("neither keeps the SLA; near gives")
    assert found.needed == (5, 20)  # 9.5 requests/s in time of 10, at 8 and 2 a second by 4 GPUs


@pytest.mark.parametrize(("first", "second"), [(4, 0), (0, 4), (0, 0)])
def test_without_a_count_of_gpus_nothing_is_said_of_costs(first: int, second: int) -> None:
    found = compared(LOAD, side("one", first, 0.1), side("two", second, 0.1))
    assert found.winner == ""
    assert "cost is not known" in found.verdict
    assert "-" in table_of(LOAD, side("one", first, 0.1), side("two", second, 0.1), found)


def test_a_spoiled_measurement_decides_nothing() -> None:
    found = compared(LOAD, side("sound", 4, 0.1), side("spoiled", 4, 0.1, broken=200))
    assert found.winner == ""
    assert found.verdict == "nothing can be said: the measurement of spoiled is not to be relied on"


def test_what_is_unsure_is_not_decided() -> None:
    strict = msgspec.structs.replace(LOAD, sla=Sla(ttft_s=0.2, percentile=0.99999))
    found = compared(strict, side("one", 4, 0.1, load=strict), side("two", 4, 0.1, load=strict))
    assert "whether one and two keep the SLA cannot be told" in found.verdict


def test_without_an_sla_throughput_by_gpu_decides() -> None:
    plain = msgspec.structs.replace(LOAD, sla=Sla())
    found = compared(plain, side("large", 8, 0.1, load=plain), side("small", 4, 0.1, load=plain))
    assert (found.winner, found.verdict[:16]) == ("b", "no SLA was given")


def test_a_closed_loop_has_no_rate_to_provide_for() -> None:
    assert (
        units_needed(msgspec.structs.replace(LOAD, arrivals=Closed(concurrency=3)), side("one", 4, 0.1))
        is None
    )


def test_what_is_never_in_time_no_number_of_gpus_helps() -> None:
    assert units_needed(LOAD, side("never", 4, 0.5)) is None
