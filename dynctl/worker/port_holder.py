"""Which process listens where an engine is to, and whether it is the engine.

What cannot be read (another user's process) is unknown, never guessed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dynctl import procfs
from dynctl.listeners import holders, listeners
from dynctl.procfs import PROC

_MARKS = ("DYNCTL_RUN", "DYNCTL_PROCESS", "DYNCTL_INCARNATION")


@dataclass(frozen=True, slots=True)
class Holder:
    """The process behind a listening socket; `pid` 0 = not known. `ours`: of the engine's own processes."""

    port: int
    pid: int
    name: str
    ours: bool

    def __str__(self) -> str:
        if not self.pid:
            return f"port {self.port} is held by a process of another user"
        return f"port {self.port} is held by pid {self.pid} ({self.name})"


def listening_inodes(host: str, port: int, proc: Path = PROC) -> frozenset[str]:
    """Socket inodes that listen where a connection to `host` could arrive; a name stands for any address."""
    return frozenset(one.inode for one in listeners(proc) if one.port == port and one.meets(host))


def find_holder(host: str, port: int, engine_pid: int, proc: Path = PROC) -> Holder | None:
    """Who listens on `host`:`port`; None = nobody. A stranger is named before the engine's own process.

    `engine_pid` leads the engine's process group (0 = it is not started yet, so nobody is ours).
    """
    inodes = listening_inodes(host, port, proc)
    if not inodes:
        return None
    pids = sorted({pid for held in holders(inodes, proc).values() for pid in held})
    ours = [pid for pid in pids if engine_pid and _belongs(pid, engine_pid, proc)]
    strangers = [pid for pid in pids if pid not in ours]
    for pid in (*strangers, *ours):
        return Holder(port, pid, procfs.name(pid, proc) or "gone", ours=not strangers)
    return Holder(port, 0, "", ours=False)


def is_former_self(pid: int, proc: Path = PROC) -> bool:
    """Whether `pid` is of this run and seat too: an incarnation before this one that is about to be gone."""
    mine, its = _marks(os.getpid(), proc), _marks(pid, proc)
    return "DYNCTL_RUN" in mine and all(mine.get(key) == its.get(key) for key in _MARKS[:2])


def _belongs(pid: int, engine_pid: int, proc: Path) -> bool:
    """In the engine's group or session, below it, or marked as this very start (a container's process)."""
    at = pid
    while at > 1 and (found := procfs.stat(at, proc)) is not None:
        if engine_pid in (at, found.pgid, found.session):
            return True
        at = found.ppid
    mine = _marks(os.getpid(), proc)
    return len(mine) == len(_MARKS) and _marks(pid, proc) == mine


def _marks(pid: int, proc: Path) -> dict[str, str]:
    """What dynctl put into the environment of `pid`."""
    return {name: value for name, value in procfs.environment(pid, proc).items() if name in _MARKS}
