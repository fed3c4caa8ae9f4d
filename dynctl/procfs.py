"""Reads /proc: who is alive, since when, whose child, with what environment. Linux only.

A process may end at any moment: one that has vanished is a None, or is left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Stat:
    """Of proc_pid_stat(5): state letter, parent, process group, session, start in clock ticks since boot."""

    pid: int
    state: str
    ppid: int
    pgid: int
    session: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """False for a zombie: it has ended and only waits to be reaped."""
        return self.state not in ("Z", "X", "x")


def stat(pid: int, proc: Path = PROC) -> Stat | None:
    """The process with this pid, or None."""
    try:
        text = (proc / str(pid) / "stat").read_bytes()
    except _GONE:
        return None
    # The name in parentheses may itself hold blanks and parentheses: fields start after the last one.
    fields = text[text.rindex(b")") + 2 :].split()
    parent, group, session = (int(field) for field in fields[1:4])
    return Stat(pid, fields[0].decode(), parent, group, session, int(fields[19]))


def alive(pid: int, start_ticks: int) -> bool:
    """Whether exactly this process lives."""
    found = stat(pid) if pid > 0 else None
    return found is not None and found.alive and found.start_ticks == start_ticks


def name(pid: int, proc: Path = PROC) -> str:
    """What the process is called; "" when it is gone."""
    try:
        return (proc / str(pid) / "comm").read_text("utf-8", "replace").strip()
    except _GONE:
        return ""


def environment(pid: int, proc: Path = PROC) -> dict[str, str]:
    """The environment a process was started with; {} when it is gone or not ours to read."""
    try:
        raw = (proc / str(pid) / "environ").read_bytes()
    except _GONE:
        return {}
    pairs = (item.decode(errors="replace").partition("=") for item in raw.split(b"\0") if item)
    return {variable: value for variable, _, value in pairs}


def opened(pid: int, proc: Path = PROC) -> Iterator[str]:
    """What its descriptors point at ("socket:[INODE]"); nothing when it is gone or not ours to look into."""
    folder = proc / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except _GONE:
        return
    for descriptor in names:
        with suppress(*_GONE):  # closed since
            yield os.readlink(folder / descriptor)


def pids(proc: Path = PROC) -> list[int]:
    """Pids of all processes, ascending."""
    return sorted(int(entry) for entry in os.listdir(proc) if entry.isdigit())


def pids_of_user(uid: int, proc: Path = PROC) -> list[int]:
    """Pids of all processes of a user, ascending."""
    found = []
    for pid in pids(proc):
        with suppress(*_GONE):
            if os.stat(proc / str(pid)).st_uid == uid:
                found.append(pid)
    return found
