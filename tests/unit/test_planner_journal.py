"""The planner's journal: whole lines only, bounded, readable after a crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.planner.core import Ahead, Decision, RoleDecision
from dynctl.planner.journal import Entry, append, read
from dynctl.planner.memory import Interval
from dynctl.planner.observe import Observation, RoleLoad


def entry(number: int) -> Entry:
    role = RoleDecision(current=1, target=2, code="up", why="demand takes 2", floor=2)
    return Entry(
        ts=float(number),
        decision=Decision(
            at=1.0,
            roles={"decode": role},
            ahead=Ahead(rate=1.0, isl=2.0, osl=3.0, hit_rate=0.0, horizon_s=60.0, now=1.0),
        ),
        observation=Observation(span_s=5.0, arrivals=3, roles={"decode": RoleLoad(wanted=1, ready=1)}),
        interval=Interval(1.0, 2.0, 3.0),
        outcome="done",
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "planner.jsonl"
    assert read(path) == []
    for number in range(3):
        append(path, entry(number))
    assert read(path) == [entry(number) for number in range(3)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_line_half_written_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "planner.jsonl"
    append(path, entry(1))
    with path.open("ab") as file:
        file.write(b'{"ts": 2.0, "deci\n{}\n')
    append(path, entry(3))
    assert [one.ts for one in read(path)] == [1.0, 3.0]


def test_a_journal_does_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "planner.jsonl"
    for number in range(200):
        append(path, entry(number), most=8192)
    assert path.stat().st_size <= 8192
    kept = [one.ts for one in read(path)]
    assert kept[-1] == 199.0
    assert kept == sorted(kept)
    assert len(kept) > 5


def test_a_journal_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        append(tmp_path, entry(1))
    with pytest.raises(OSError, match="directory"):
        read(tmp_path)
