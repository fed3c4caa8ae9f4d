"""Copies of logs have each line once, also of a worker that was on several nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.agent.logs import read_logs
from dynctl.launchers.log_copies import LogCopies


def node(tmp_path: Path, name: str, *lines: str) -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    with (folder / "decode-0.log").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    return folder


def copy(copies: LogCopies, folder: Path) -> None:
    copies.take(read_logs(folder, copies.call()).parts)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    made = tmp_path / "logs"
    made.mkdir()
    return made


def test_lines_of_a_worker_that_was_moved_are_copied_once_also_by_the_next_controller(
    tmp_path: Path, logs: Path
) -> None:
    one, two = node(tmp_path, "n1", "n1 starts", "n1 serves"), node(tmp_path, "n2", "n2 starts")
    wanted = ["n1 starts", "n1 serves", "n2 starts"]
    first = [LogCopies(logs, "n1"), LogCopies(logs, "n2")]
    for _ in range(2):
        copy(first[0], one)
        copy(first[1], two)
    assert (logs / "decode-0.log").read_text().splitlines() == wanted
    second = [LogCopies(logs, "n1"), LogCopies(logs, "n2")]
    copy(second[0], one)
    copy(second[1], two)
    node(tmp_path, "n2", "n2 serves")
    copy(second[1], two)
    assert (logs / "decode-0.log").read_text().splitlines() == [*wanted, "n2 serves"]


def test_a_long_log_of_the_next_node_is_copied_from_its_beginning(tmp_path: Path, logs: Path) -> None:
    (logs / "decode-0.log").write_text("x\n")  # of the head itself, where it was before
    copy(LogCopies(logs, "n2"), node(tmp_path, "n2", "first", "second"))
    assert (logs / "decode-0.log").read_text().splitlines() == ["x", "first", "second"]
