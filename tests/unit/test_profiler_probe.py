"""What a probe may be made of: tokens that came, prompts that were new, or known where that was meant."""

from __future__ import annotations

from array import array

import pytest

from dynctl.profiler.load.lag import ClientLoad
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.result import summed_up
from dynctl.profiler.load.run import Measured
from dynctl.profiler.load.spec import Closed, Lengths, Load
from dynctl.profiler.probe import Refused, decode_point, prefill_point

CALM = ClientLoad(lag_mean_s=0.0, lag_p95_s=0.0, lag_p99_s=0.0, lag_max_s=0.0, cpu=0.1)
BUSY = ClientLoad(lag_mean_s=0.03, lag_p95_s=0.05, lag_p99_s=0.05, lag_max_s=0.05, cpu=0.3)


def record(number: int, begin_s: float, step_s: float, tokens: int, *, cached: int | None = 0) -> Record:
    """An answer whose first token comes 0.1 s after it was asked for."""
    times = [begin_s + 0.1 + step_s * i for i in range(tokens)]
    return Record(
        number=number,
        due_s=begin_s,
        sent_s=begin_s,
        end_s=times[-1],
        times=array("d", times),
        asked_input=100,
        asked_output=tokens,
        input_tokens=100,
        output_tokens=tokens,
        cached_tokens=cached,
        counted=True,
        finish="length",
    )


def measured(
    records: list[Record], tokens: int, *, repeated: bool = False, client: ClientLoad = CALM
) -> Measured:
    load = Load(
        arrivals=Closed(concurrency=1),
        isl=Lengths(tokens=100),
        osl=Lengths(tokens=tokens),
        requests=len(records),
        warmup=0 if repeated else 1,
        repeated=repeated,
    )
    return Measured(summed_up(load, records, client), tuple(records), load)


def test_prompts_are_timed_to_their_first_token_without_the_warm_up() -> None:
    records = [record(i, i, 0.01, 1) for i in range(6)]
    records[0].times[0] += 5.0
    point = prefill_point(measured(records, 1))
    assert point.seconds == pytest.approx(0.1)
    assert (point.requests, point.isl) == (5, 100.0)


@pytest.mark.parametrize("spoilt", ["cached", "failed", "busy", "short"])
def test_what_spoils_a_point_refuses_it_with_the_reason(spoilt: str) -> None:
    records = [record(i, i, 0.01, 2) for i in range(6)]
    client = CALM
    if spoilt == "cached":
        records[3].cached_tokens = 90
        records[4].cached_tokens = 90
    elif spoilt == "failed":
        records[3].error = "status 500"
    elif spoilt == "busy":
        client = BUSY
    else:
        records[3].output_tokens = 1
    with pytest.raises(Refused) as raised:
        prefill_point(measured(records, 2, client=client))
    said = {"cached": "cache", "failed": "status 500", "busy": "late", "short": "ended before"}
    assert said[spoilt] in raised.value.reason


def test_a_step_is_timed_while_all_answers_are_written_and_not_before() -> None:
    """The first answer is alone for a while, and fast."""
    early = record(0, 0.0, 0.001, 400, cached=99)
    for i in range(200, 400):
        early.times[i] = early.times[199] + 0.02 * (i - 199)
    late = record(1, 0.2, 0.02, 60, cached=99)
    point = decode_point(measured([early, late], 60, repeated=True), 2)
    assert point.seconds == pytest.approx(0.02, rel=0.02)
    assert point.batch == 2


def test_a_moment_in_which_the_machine_does_something_else_is_not_in_a_step() -> None:
    records = [record(i, 0.0, 0.02, 40, cached=99) for i in range(2)]
    for one in records:
        for i in range(20, 40):
            one.times[i] += 0.5
        one.end_s += 0.5
    point = decode_point(measured(records, 40, repeated=True), 2)
    assert point.seconds == pytest.approx(0.02, rel=0.02)


def test_answers_after_each_other_are_no_batch() -> None:
    records = [record(i, i * 10.0, 0.01, 40, cached=99) for i in range(2)]
    with pytest.raises(Refused, match="not written at the same time"):
        decode_point(measured(records, 40, repeated=True), 2)


def test_a_second_pass_that_missed_the_cache_is_refused() -> None:
    records = [record(i, 0.0, 0.01, 40, cached=10) for i in range(2)]
    with pytest.raises(Refused, match="only 10% of the prompts were in the cache"):
        decode_point(measured(records, 40, repeated=True), 2)


def test_an_engine_that_does_not_tell_of_its_cache_is_believed_by_what_was_written_together() -> None:
    records = [record(i, 0.0, 0.01, 40, cached=None) for i in range(2)]
    assert decode_point(measured(records, 40, repeated=True), 2).cached is None
