"""The journal outlives whatever happens to who writes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from dynctl.errors import ProfileError, UsageError
from dynctl.perfmodel.layout import Layout
from dynctl.profiler.journal import OLD, Journal, key_of
from dynctl.profiler.outcome import PrefillPoint

POINT = PrefillPoint(isl=100.0, seconds=0.1, low_s=0.09, high_s=0.11, requests=5)


def opened(folder: Path, *, resume: bool = True, run: str = "r1") -> Journal:
    return Journal(folder / "journal.jsonl", run, resume=resume, clock=lambda: 1.0)


def test_what_was_found_is_found_again(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.answer("k", "TP1 prefill 100", POINT)
    first.answer("none", "TP1 prefill 200", refused="the client was late")
    first.close()
    again = opened(tmp_path, run="r2")
    found = again.found("k")
    assert found is not None
    assert found["seconds"] == 0.1
    assert again.found("none") is None
    again.close()


def test_a_torn_last_line_is_cut_off_and_the_next_one_is_whole(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.answer("k", "w", POINT)
    first.close()
    path = tmp_path / "journal.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind":"answer","run":"r1","key":"t')
    again = opened(tmp_path)
    again.answer("k2", "w", POINT)
    again.close()
    third = opened(tmp_path)
    assert third.found("k") is not None
    assert third.found("k2") is not None
    third.close()


def test_a_broken_line_in_the_middle_is_told_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"kind":"run","run":"r","at":1}\nnonsense\n')
    with pytest.raises(ProfileError) as raised:
        opened(tmp_path)
    assert raised.value.where.endswith("journal.jsonl:2")


def test_two_at_once_do_not_write_into_one_journal(tmp_path: Path) -> None:
    first = opened(tmp_path)
    with pytest.raises(UsageError, match="another dynctl profile is at work"):
        opened(tmp_path)
    first.close()
    opened(tmp_path).close()


def test_without_resume_the_old_one_is_put_aside_but_what_runs_is_remembered(tmp_path: Path) -> None:
    first = opened(tmp_path)
    first.answer("k", "w", POINT)
    first.add("started", "profile-r1-tp1")
    first.add("started", "profile-r1-tp2")
    first.add("ended", "profile-r1-tp2")
    first.close()
    again = opened(tmp_path, resume=False, run="r2")
    assert again.found("k") is None
    assert [entry.name for entry in again.left] == ["profile-r1-tp1"]
    again.close()
    assert (tmp_path / OLD).exists()
    third = opened(tmp_path, run="r3")
    assert [(entry.name, entry.run) for entry in third.left] == [("profile-r1-tp1", "r1")]
    third.close()


def test_a_full_disk_leaves_whole_lines_and_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = opened(tmp_path)
    whole = (tmp_path / "journal.jsonl").read_bytes()
    real, free = os.write, [10]

    def write(fd: int, raw: bytes) -> int:
        if not free[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        part, free[0] = raw[: free[0]], 0
        return real(fd, part)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(ProfileError, match="No space left on device") as raised:
        journal.answer("k", "w", POINT)
    assert "--resume" in raised.value.hint
    assert (tmp_path / "journal.jsonl").read_bytes() == whole
    journal.close()


def test_a_key_is_of_all_parts_whatever_the_order_of_mappings() -> None:
    assert key_of({"a": 1, "b": 2}, Layout()) == key_of({"b": 2, "a": 1}, Layout())
    assert key_of({"a": 1, "b": 2}, Layout()) != key_of({"a": 1, "b": 3}, Layout())
    assert key_of({"a": 1}, Layout()) != key_of({"a": 1}, Layout(tensor=2))
