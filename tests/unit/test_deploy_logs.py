"""Logs of a run: selected, merged by time, followed."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from dynctl.deploy.logs import (
    Follower,
    LogFile,
    is_selection,
    log_files,
    merged,
    parse_since,
    parse_time,
    read_lines,
)
from dynctl.errors import UsageError
from dynctl.launchers.last_lines import tail

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC).timestamp()


def local(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("controller", "frontend-0", "decode-0", "decode-0.engine", "decode-0.1", "decode-11"):
        (tmp_path / f"{name}.log").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("select", "sources"),
    [
        ("decode", ["decode-0", "decode-0.1", "decode-0.engine", "decode-11"]),
        ("decode/0", ["decode-0", "decode-0.1", "decode-0.engine"]),
        ("decode-0.1", ["decode-0.1"]),
        ("decode/11", ["decode-11"]),
        ("engine", ["decode-0.engine"]),
        ("engine/0", ["decode-0.engine"]),
        ("controller", ["controller"]),
        ("frontend-0", ["frontend-0"]),
    ],
)
def test_a_role_or_one_of_its_replicas_is_selected(folder: Path, select: str, sources: list[str]) -> None:
    assert [f.source for f in log_files(folder, select)] == sources
    assert is_selection(select)


def test_no_selection_is_all(folder: Path) -> None:
    assert len(log_files(folder)) == 6


@pytest.mark.parametrize("select", ["prefill", "decode/1", "Decode!", "engine/9"])
def test_a_selection_that_fits_nothing_names_what_there_is(folder: Path, select: str) -> None:
    with pytest.raises(UsageError, match="no log of") as caught:
        log_files(folder, select)
    assert "frontend-0" in caught.value.hint


def test_a_name_is_no_selection() -> None:
    assert not is_selection("quickstart")
    assert not is_selection("my-model-7")


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-01T11:00:00.250Z INFO x", NOW - 3600 + 0.25),
        ("[2026-03-01T11:00:00+00:00] x", NOW - 3600),
        ('{"time": "2026-03-01T11:00:00.5Z"}', NOW - 3600 + 0.5),
        ("INFO 2026-03-01 09:00:00,125 [a] x", local("2026-03-01T09:00:00.125")),
        ("INFO 03-01 09:00:00 [a.py:1] x", local("2026-03-01T09:00:00")),
        ("(EngineCore pid=1) INFO 03-01 09:00:00.5 x", local("2026-03-01T09:00:00.5")),
        ("INFO 12-31 09:00:00 [a.py:1] x", local("2025-12-31T09:00:00")),
        ("no time in here", 0.0),
        ("2026-99-01T11:00:00Z", 0.0),
        ("INFO 13-45 09:00:00 x", 0.0),
        (" " * 80 + "2026-03-01T11:00:00Z", 0.0),
    ],
)
def test_the_time_of_a_line(text: str, at: float) -> None:
    assert parse_time(text, NOW) == at


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90s", NOW - 90),
        ("1.5h", NOW - 5400),
        ("2d", NOW - 172800),
        ("2026-03-01T10:00:00+00:00", NOW - 7200),
    ],
)
def test_since(text: str, at: float) -> None:
    assert parse_since(text, NOW) == at


def test_since_that_is_no_time() -> None:
    with pytest.raises(UsageError, match="no time: 'yesterday'"):
        parse_since("yesterday", NOW)


def test_lines_without_a_time_stay_with_the_line_before_when_merged(tmp_path: Path) -> None:
    one, two = tmp_path / "a.log", tmp_path / "b.log"
    one.write_text(
        "2026-03-01T10:00:00Z one\n  traceback\n2026-03-01T10:00:02Z three\n2026-03-01T09:00:00Z late\n"
    )
    two.write_text("2026-03-01T10:00:01Z two\r\n")
    lines = merged([LogFile("a", one), LogFile("b", two)], NOW)
    assert [line.text[-9:].strip() for line in lines] == [
        "00:00Z one".strip()[-9:],
        "traceback",
        "00:01Z two"[-9:].strip(),
        "02Z three",
        ":00Z late",
    ]


def test_since_leaves_out_older_lines_and_files(tmp_path: Path) -> None:
    timed, bare = tmp_path / "a.log", tmp_path / "b.log"
    timed.write_text("2026-03-01T10:00:00Z old\n2026-03-01T11:00:00Z new\n more\n")
    bare.write_text("no times\n")
    os.utime(bare, (NOW - 7200, NOW - 7200))
    files = [LogFile("a", timed), LogFile("b", bare)]
    assert [line.text for line in merged(files, NOW, NOW - 3600)] == ["2026-03-01T11:00:00Z new", " more"]
    os.utime(bare, (NOW, NOW))
    assert "no times" in [line.text for line in merged(files, NOW, NOW - 3600)]


def test_a_file_that_is_gone_has_no_lines(tmp_path: Path) -> None:
    gone = LogFile("a", tmp_path / "a.log")
    assert list(read_lines(gone, NOW)) == []
    assert tail(gone.path, 3) == []
    assert Follower(NOW).read([gone]) == []
    assert Follower(NOW).skip(gone) == 0


def test_the_tail_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("".join(f"line {i} {'x' * 100}\n" for i in range(5000)))
    assert [line.split()[1] for line in tail(path, 2)] == ["4998", "4999"]
    path.write_text("only")
    assert tail(path, 2) == ["only"]


def test_following_gives_each_line_once(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("one\ntw")
    file = LogFile("a", path)
    follower = Follower(time.time())
    end = follower.skip(file)
    assert [line.text for line in read_lines(file, NOW, 0.0, end)] == ["one"]
    assert follower.read([file]) == []
    with path.open("a") as stream:
        stream.write("o\nthree\nfo")
    assert [line.text for line in follower.read([file])] == ["two", "three"]
    path.write_text("anew\n")
    assert [line.text for line in follower.read([file])] == ["anew"]


def test_following_skips_a_file_without_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("x" * 70000)
    follower = Follower(NOW)
    assert follower.skip(LogFile("a", path)) == 0
