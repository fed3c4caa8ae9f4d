"""Traces: what they tell, and which line is at fault when one is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.trace import load_trace
from dynctl.profiler.traces import demand_of

GOOD = (
    '{"timestamp": 0, "input_length": 1024, "output_length": 10, "hash_ids": [1, 2]}\n'
    '{"timestamp": 500, "input_length": 1536, "output_length": 30, "hash_ids": [1, 2, 3]}\n'
    "\n"
    '{"timestamp": 2000, "input_length": 512, "output_length": 20, "hash_ids": [9]}\n'
)


def written(folder: Path, text: str) -> Path:
    path = folder / "trace.jsonl"
    path.write_text(text)
    return path


def test_a_trace_tells_lengths_rate_and_what_was_seen_before(tmp_path: Path) -> None:
    demand = demand_of(load_trace(written(tmp_path, GOOD)), "t")
    assert demand.lengths == ((1024, 10), (1536, 30), (512, 20))
    assert demand.rate == pytest.approx(1.0)
    assert demand.hit_rate == pytest.approx(1024 / 3072)


def test_a_whole_prompt_seen_before_still_computes_its_last_token(tmp_path: Path) -> None:
    line = '{"timestamp": %d, "input_length": 1024, "output_length": 1, "hash_ids": [1, 2]}\n'
    demand = demand_of(load_trace(written(tmp_path, line % 0 + line % 10)), "t")
    assert demand.hit_rate == pytest.approx(1023 / 2048)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "no request of a trace"),
        ('{"timestamp": 1, "input_length": 5}', "output_length"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 5}', "0 prompt and 5 answer tokens"),
        ('{"timestamp": 1, "input_length": 7, "output_length": 0}', "7 prompt and 0 answer tokens"),
        ('{"timestamp": -1, "input_length": 7, "output_length": 1}', "a time of -1 ms"),
        ('{"timestamp": 1, "input_length": "7", "output_length": 1}', "input_length"),
        ('{"timestamp": 1, "input_length": 7, "output_len', "no request of a trace"),
    ],
)
def test_a_broken_line_is_told_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path, GOOD + line + "\n" + GOOD)
    with pytest.raises(ProfileError, match=said) as caught:
        load_trace(path)
    assert caught.value.where == f"{path}:5"


def test_bytes_that_are_no_text_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(GOOD.encode() + b'{"timestamp": 1, "x": "\xff\xfe"}\n')
    with pytest.raises(ProfileError) as caught:
        load_trace(path)
    assert caught.value.where == f"{path}:5"


def test_an_empty_or_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="holds no request"):
        load_trace(written(tmp_path, "\n\n"))
    with pytest.raises(ProfileError, match="cannot read the trace"):
        load_trace(tmp_path / "none.jsonl")


def test_requests_at_one_time_tell_no_rate(tmp_path: Path) -> None:
    lines = load_trace(written(tmp_path, GOOD.splitlines()[0]))
    with pytest.raises(ProfileError, match="tells no rate"):
        demand_of(lines, "t")
    assert demand_of(lines, "t", 3.0).rate == 3.0
