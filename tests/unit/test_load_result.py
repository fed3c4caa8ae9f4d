"""From records to figures: by the book's definitions, and with every reason not to rely on them."""

from __future__ import annotations

import csv
import io
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.trace import TraceRequest
from dynctl.profiler.load.files import COLUMNS, csv_text, load_object, save, writable
from dynctl.profiler.load.lag import ClientLoad
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.result import Result, meets_sla, summed_up
from dynctl.profiler.load.spec import Closed, Lengths, Load, Open, Replay

LOAD = Load(arrivals=Open(rate=10), requests=40, isl=Lengths(tokens=100), osl=Lengths(tokens=5))
IDLE = ClientLoad(lag_mean_s=0.0, lag_p95_s=0.0, lag_p99_s=0.0, lag_max_s=0.0, cpu=0.1)


def record(number: int = 0, **changed: Any) -> Record:
    """Sent at number/10 s, first token after 100 ms, five tokens 20 ms apart."""
    sent_s = number / 10
    times = array("d", (sent_s + 0.1 + 0.02 * n for n in range(5)))
    given: dict[str, Any] = {
        "number": number,
        "due_s": sent_s,
        "sent_s": sent_s,
        "end_s": times[-1],
        "times": times,
        "asked_input": 100,
        "asked_output": 5,
        "input_tokens": 100,
        "output_tokens": 5,
        "cached_tokens": 0,
        "counted": True,
        "finish": "length",
    }
    return Record(**{**given, **changed})


def summed(records: list[Record], load: Load = LOAD, client: ClientLoad = IDLE) -> Result:
    return summed_up(load, records, client)


SOUND = [record(number) for number in range(40)]


def test_the_definitions() -> None:
    one = record()
    assert one.ttft_s == pytest.approx(0.1)
    assert one.e2e_s == pytest.approx(0.18)
    assert one.tpot_s == pytest.approx(0.02)
    assert one.gaps_s == pytest.approx([0.02] * 4)
    assert record(output_tokens=1).tpot_s is None
    # Pieces of several tokens: TPOT goes by tokens, ITL by pieces.
    assert record(output_tokens=9).tpot_s == pytest.approx(0.01)


def test_a_sound_load_has_no_problems() -> None:
    found = summed(SOUND)
    assert found.valid, found.problems
    assert (found.counts.offered, found.counts.completed, found.counts.late) == (40, 40, 0)
    assert found.window_s == pytest.approx(4.08)
    assert found.request_rate == pytest.approx(40 / 4.08)
    assert found.output_rate.value == pytest.approx(200 / 4.08)
    assert found.input_rate == pytest.approx(4000 / 4.08)
    assert found.cached == 0.0
    assert found.meets == ""


def test_the_warm_up_is_not_counted() -> None:
    slow = [record(n, times=array("d", [n / 10 + 9, n / 10 + 10])) for n in range(8)]
    found = summed([*slow, *SOUND[8:]], msgspec.structs.replace(LOAD, warmup=8, requests=32))
    assert (found.counts.offered, found.counts.warmup) == (32, 8)
    assert found.ttft_s is not None
    assert found.ttft_s.max == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("sla", "met"),
    [
        (Sla(ttft_s=0.11), True),
        (Sla(ttft_s=0.09), False),
        (Sla(itl_s=0.021), True),
        (Sla(itl_s=0.019), False),
        (Sla(ttft_s=0.11, itl_s=0.019), False),
        (Sla(), True),
    ],
)
def test_an_sla_is_met_when_all_its_parts_are(sla: Sla, met: bool) -> None:
    assert meets_sla(record(), sla) is met
    assert not meets_sla(record(error="x"), sla)


def test_one_token_cannot_miss_the_itl() -> None:
    assert meets_sla(record(output_tokens=1), Sla(itl_s=0.001))


def test_a_failed_request_misses_the_sla() -> None:
    load = msgspec.structs.replace(LOAD, sla=Sla(ttft_s=0.2))
    many = [record(n) for n in range(200)]
    assert summed(many, load).meets == "yes"
    failed = [record(n, error="broke" if n % 4 == 0 else "") for n in range(200)]
    found = summed(failed, load)
    assert (found.meets, found.attainment.value) == ("no", 0.75)
    assert found.goodput.value == pytest.approx(150 / found.window_s)


def test_a_small_sample_is_not_taken_for_an_sla_that_is_met() -> None:
    assert summed(SOUND[:20], msgspec.structs.replace(LOAD, sla=Sla(ttft_s=0.2))).meets == "unsure"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"error": "status 500: no memory"}, "1 of 40 requests failed, most often: status 500: no memory"),
        ({"interrupted": True}, "stopped with 1 requests in flight"),
        ({"counted": False}, "1 answers came without usage"),
        ({"output_tokens": 3}, "1 of 40 answers ended before"),
        ({"input_tokens": 500}, "prompts were 110 tokens on average instead of 100"),
        ({"sent_s": 2.05}, "1 of 40 requests were sent after their time"),
    ],
)
def test_what_spoils_a_measurement_is_told(changed: dict[str, Any], said: str) -> None:
    found = summed([*SOUND[:20], record(20, **changed), *SOUND[21:]])
    assert not found.valid
    assert said in found.problems[0]


def test_prompts_cached_by_accident_are_told_of_and_shared_ones_are_not() -> None:
    warm = [record(n, cached_tokens=60) for n in range(40)]
    assert "60% of the prompts' tokens were in the server's cache" in summed(warm).problems[0]
    assert summed(warm, msgspec.structs.replace(LOAD, shared_tokens=60)).valid
    turns = msgspec.structs.replace(LOAD, arrivals=Closed(concurrency=1), turns=2)
    assert summed(warm, turns).valid


def test_a_server_that_does_not_tell_its_cache_is_not_taken_for_cold() -> None:
    assert summed([record(n, cached_tokens=None) for n in range(40)]).cached is None


@pytest.mark.parametrize(
    ("client", "said"),
    [
        (msgspec.structs.replace(IDLE, cpu=0.95), "95% of a core"),
        (msgspec.structs.replace(IDLE, lag_p95_s=0.0055), "5.5 ms late (p95; 4.0 ms can be borne)"),
    ],
)
def test_a_client_that_is_the_bottleneck_is_told_of(client: ClientLoad, said: str) -> None:
    """The shortest span judged is that from the first to the last token, 80 ms."""
    assert said in summed(SOUND, client=client).problems[0]


def test_the_sla_says_how_much_lag_can_be_borne() -> None:
    late = msgspec.structs.replace(IDLE, lag_p95_s=0.0055)
    assert summed(SOUND, msgspec.structs.replace(LOAD, sla=Sla(ttft_s=0.2, itl_s=0.05)), late).valid


def test_nothing_measured_is_no_result() -> None:
    found = summed([])
    assert found.problems == ("no request completed",)
    assert (found.ttft_s, found.request_rate, found.meets) == (None, 0.0, "")
    assert summed([record(error="x")]).ttft_s is None


def test_one_row_of_csv_for_each_request_whatever_became_of_it() -> None:
    broken = record(1, error='said "no",\nthen left', times=array("d"))
    left = record(2, interrupted=True, times=array("d"), cached_tokens=None)
    rows = list(csv.DictReader(io.StringIO(csv_text([left, broken, record(0)], LOAD))))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert list(rows[0]) == list(COLUMNS)
    assert (rows[0]["ttft_s"], rows[0]["tpot_s"], rows[0]["meets_sla"]) == ("0.100000", "0.020000", "1")
    assert (rows[1]["error"], rows[1]["ttft_s"]) == ('said "no",\nthen left', "")
    assert (rows[2]["error"], rows[2]["cached_tokens"]) == ("interrupted", "")


def test_a_trace_is_not_written_out_with_the_result() -> None:
    requests = tuple(TraceRequest(at_s=n, prompt_tokens=1, output_tokens=1) for n in range(9))
    assert load_object(Load(arrivals=Replay(requests=requests)))["arrivals"]["requests"] == 9
    assert load_object(LOAD)["arrivals"] == {"type": "open", "rate": 10.0, "burstiness": 1.0}


def test_where_nothing_can_be_written_is_told_before_and_after(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "directory"), (tmp_path / "no" / "x", "no such directory")):
        with pytest.raises(ProfileError, match=said):
            writable(path)
    writable(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProfileError, match="No space left on device") as raised:
        save(Path("/dev/full"), "x" * 100_000)
    assert raised.value.where == "/dev/full"
    assert Path("/dev/full").is_char_device()
