"""When a load sends: rates that are wrong, times that drift, seeds that do not hold."""

from __future__ import annotations

import itertools
from statistics import fmean, pstdev

import msgspec
import pytest

from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.trace import TraceRequest, load_trace, parse_trace
from dynctl.profiler.load.schedule import arrivals
from dynctl.profiler.load.spec import Closed, Lengths, Load, Open, Replay, check

POISSON = Load(arrivals=Open(rate=50), requests=4000, seed=3)


def gaps(load: Load) -> list[float]:
    return [after - before for before, after in itertools.pairwise(arrivals(load))]


def test_the_same_seed_gives_the_same_times_and_another_others() -> None:
    assert list(arrivals(POISSON)) == list(arrivals(POISSON))
    assert gaps(POISSON) != gaps(msgspec.structs.replace(POISSON, seed=4))


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5), (None, 0.0)])
def test_gaps_have_the_rate_and_the_variation_asked_for(burstiness: float | None, variation: float) -> None:
    """A gamma law of shape k has a coefficient of variation of 1/sqrt(k)."""
    found = gaps(msgspec.structs.replace(POISSON, arrivals=Open(rate=50, burstiness=burstiness)))
    assert fmean(found) == pytest.approx(1 / 50, rel=0.1)
    assert pstdev(found) / fmean(found) == pytest.approx(variation, rel=0.1, abs=1e-6)


def test_a_load_ends_by_its_number_or_its_time_whichever_is_first() -> None:
    assert len(list(arrivals(msgspec.structs.replace(POISSON, requests=7, warmup=3)))) == 10
    timed = list(arrivals(msgspec.structs.replace(POISSON, requests=0, duration_s=2.0)))
    assert timed[-1] <= 2.0
    assert 60 < len(timed) < 140
    both = msgspec.structs.replace(POISSON, requests=5, duration_s=2.0)
    assert len(list(arrivals(both))) == 5


def test_a_closed_loop_has_no_times_but_a_number() -> None:
    assert list(arrivals(Load(arrivals=Closed(concurrency=2), requests=3, warmup=1))) == [0.0] * 4


def test_a_trace_begins_at_once_and_is_replayed_faster() -> None:
    requests = tuple(TraceRequest(at_s=at_s, prompt_tokens=1, output_tokens=1) for at_s in (10.0, 12.0, 20.0))
    replay = Replay(requests=requests, speedup=4)
    assert list(arrivals(Load(arrivals=replay))) == [0.0, 0.5, 2.5]
    assert list(arrivals(Load(arrivals=replay, duration_s=1.0))) == [0.0, 0.5]
    assert list(arrivals(Load(arrivals=replay, requests=1, warmup=1))) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"isl": Lengths(tokens=0)}, "at least 1 token, not 0"),
        ({"osl": Lengths(tokens=0)}, "answers need at least 1 token"),
        ({"isl": Lengths(tokens=9, spread=1.5)}, "between 0 and 1"),
        ({"arrivals": Open(rate=0)}, "a rate must be above 0"),
        ({"arrivals": Open(rate=-2)}, "a rate must be above 0, not -2"),
        ({"arrivals": Open(rate=float("nan"))}, "a rate must be above 0"),
        ({"arrivals": Open(rate=1, burstiness=0)}, "burstiness"),
        ({"arrivals": Closed(concurrency=0)}, "concurrency"),
        ({"arrivals": Replay(requests=())}, "no requests"),
        (
            {
                "arrivals": Replay(
                    requests=(TraceRequest(at_s=0, prompt_tokens=1, output_tokens=1),), speedup=0
                )
            },
            "speed",
        ),
        ({"requests": 0}, "no end"),
        ({"requests": -1}, "negative"),
        ({"warmup": -1}, "negative"),
        ({"duration_s": -1.0}, "negative"),
        ({"deadline_s": 0.0}, "deadline"),
        ({"turns": 0}, "turn"),
        ({"prefixes": 0}, "beginning"),
        ({"shared_tokens": 512}, "cannot be shared"),
        ({"shared_tokens": -1}, "cannot be shared"),
    ],
)
def test_a_load_that_means_nothing_is_refused(changed: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check(msgspec.structs.replace(POISSON, **changed))


LINE = b'{"timestamp": 500, "input_length": 600, "output_length": 7, "hash_ids": [1, 2]}\n'


def test_a_trace_is_read_by_time() -> None:
    later = LINE.replace(b"500", b"100")
    found = parse_trace([LINE, b"\n", later], "t")
    assert [request.at_s for request in found] == [0.1, 0.5]
    assert found[1] == TraceRequest(at_s=0.5, prompt_tokens=600, output_tokens=7, blocks=(1, 2))


@pytest.mark.parametrize(
    "broken",
    [
        b"{",
        b"[]",
        b'{"timestamp": 1}',
        LINE.replace(b"600", b"0"),
        LINE.replace(b"500", b"-1"),
        b'{"a": "\xff"}',
    ],
)
def test_a_broken_line_of_a_trace_is_told_with_its_number(broken: bytes) -> None:
    with pytest.raises(ProfileError) as raised:
        parse_trace([LINE, b"\n", broken], "trace.jsonl")
    assert raised.value.where == "trace.jsonl:3"


def test_a_trace_without_requests_or_without_a_file_is_refused(tmp_path: object) -> None:
    from pathlib import Path

    with pytest.raises(ProfileError, match="no request"):
        parse_trace([b"\n"], "t")
    with pytest.raises(ProfileError, match="cannot read"):
        load_trace(Path(str(tmp_path), "none.jsonl"))
