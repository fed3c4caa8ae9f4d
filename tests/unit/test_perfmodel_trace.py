"""Traces: compressed, denser, faster; hashes that stand for the same beginning or for nobody else's."""

from __future__ import annotations

import gzip
from pathlib import Path
from random import Random

import pytest

from dynctl.errors import ProfileError
from dynctl.perfmodel.trace import PRIVATE, TraceRequest, denser, faster, hashes, load_trace

LINE = '{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [7, 8]}\n'


def test_a_compressed_trace_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress(LINE.encode()))
    assert load_trace(path) == [TraceRequest(1.5, 600, 5, (7, 8))]


@pytest.mark.parametrize("data", [b"no gzip", gzip.compress(LINE.encode() * 50)[:-9]], ids=["other", "cut"])
def test_a_broken_archive_is_told(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(ProfileError, match="not a whole gzip file"):
        load_trace(path)


def test_ids_that_do_not_fit_the_prompt_are_a_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE + LINE.replace("[7, 8]", "[7]"))
    with pytest.raises(ProfileError, match="1 hash_ids for 600 prompt tokens") as caught:
        load_trace(path)
    assert caught.value.where == f"{path}:2"


def test_equal_ids_after_other_beginnings_are_other_blocks() -> None:
    found = hashes([TraceRequest(0, 1024, 1, (1, 2)), TraceRequest(0, 1024, 1, (3, 2))], 256)
    assert not set(found[0]) & set(found[1])


def test_a_common_beginning_has_common_hashes_up_to_where_it_ends() -> None:
    long, short, alone = hashes(
        [TraceRequest(0, 1500, 1, (1, 2, 3)), TraceRequest(0, 800, 1, (1, 2)), TraceRequest(0, 800, 1)], 128
    )
    assert len(long) == 1500 // 128
    assert short == long[: 800 // 128]
    assert len(alone) == 800 // 128
    assert min(alone) >= PRIVATE > max(long)


def test_denser_repeats_requests_as_those_of_other_users() -> None:
    requests = [TraceRequest(float(i), 512, 1, (i % 3,)) for i in range(100)]
    more = denser(requests, 2.5, Random(1))
    assert 230 <= len(more) <= 270
    assert [one.at_s for one in more] == sorted(one.at_s for one in more)
    assert len({one.blocks for one in more}) == 9
    fewer = denser(requests, 0.5, Random(1))
    assert 35 <= len(fewer) <= 65
    assert set(fewer) <= set(requests)


def test_faster_keeps_all_but_the_times() -> None:
    assert faster([TraceRequest(8.0, 512, 1, (1,))], 4.0) == [TraceRequest(2.0, 512, 1, (1,))]
