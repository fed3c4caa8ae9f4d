"""Which process listens on a TCP port, from /proc. Linux only.

What cannot be read (another user's process) is unknown, never guessed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_LISTEN = "0A"
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError, NotADirectoryError)
_MARKS = (b"DYNCTL_RUN", b"DYNCTL_PROCESS", b"DYNCTL_INCARNATION")


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


def listening_inodes(host: str, port: int, proc: Path = PROC) -> frozenset[int]:
    """Socket inodes that listen where a connection to `host` could arrive; a name stands for any address."""
    wanted = _packed(host)
    found: set[int] = set()
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text("ascii").splitlines()[1:]
        except _GONE:
            continue
        for line in lines:
            fields = line.split()
            address, _, number = fields[1].rpartition(":")
            if fields[3] != _LISTEN or int(number, 16) != port:
                continue
            local = _unhex(address)
            if wanted is None or local == wanted or not any(local):
                found.add(int(fields[9]))
    return frozenset(found)


def find_holder(host: str, port: int, engine_pid: int, proc: Path = PROC) -> Holder | None:
    """Who listens on `host`:`port`; None = nobody. A stranger is named before the engine's own process.

    `engine_pid` leads the engine's process group (0 = it is not started yet, so nobody is ours).
    """
    inodes = listening_inodes(host, port, proc)
    if not inodes:
        return None
    links = {f"socket:[{inode}]" for inode in inodes}
    holders = [pid for pid in _pids(proc) if _has_socket(pid, links, proc)]
    ours = [pid for pid in holders if engine_pid and _belongs(pid, engine_pid, proc)]
    strangers = [pid for pid in holders if pid not in ours]
    if strangers:
        return Holder(port, strangers[0], _name(strangers[0], proc), ours=False)
    if ours:
        return Holder(port, ours[0], _name(ours[0], proc), ours=True)
    return Holder(port, 0, "", ours=False)


def is_former_self(pid: int, proc: Path = PROC) -> bool:
    """Whether `pid` is of this run and seat too: an incarnation before this one that is about to be gone."""
    mine, its = _marks(os.getpid(), proc), _marks(pid, proc)
    return b"DYNCTL_RUN" in mine and all(mine.get(key) == its.get(key) for key in _MARKS[:2])


def _packed(host: str) -> bytes | None:
    """The address in network order; None for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return _unmapped(socket.inet_pton(family, host))
        except OSError:
            continue
    return None


def _unhex(address: str) -> bytes:
    """The kernel prints an address as words of four bytes in the machine's own order."""
    words = (int(address[at : at + 8], 16) for at in range(0, len(address), 8))
    return _unmapped(b"".join(word.to_bytes(4, sys.byteorder) for word in words))


def _unmapped(address: bytes) -> bytes:
    """An IPv4 address inside IPv6 as plain IPv4."""
    return address[12:] if len(address) == 16 and address[:12] == bytes(10) + b"\xff\xff" else address


def _pids(proc: Path) -> Iterator[int]:
    return (int(name) for name in os.listdir(proc) if name.isdigit())


def _has_socket(pid: int, links: set[str], proc: Path) -> bool:
    folder = proc / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except _GONE:
        return False
    for name in names:
        try:
            if os.readlink(folder / name) in links:
                return True
        except _GONE:
            continue
    return False


def _belongs(pid: int, engine_pid: int, proc: Path) -> bool:
    """In the engine's group or session, below it, or marked as this very start (a container's process)."""
    at = pid
    while at > 1:
        fields = _stat(at, proc)
        if fields is None:
            break
        parent, group, session = fields
        if engine_pid in (at, group, session):
            return True
        at = parent
    mine = _marks(os.getpid(), proc)
    return len(mine) == len(_MARKS) and _marks(pid, proc) == mine


def _stat(pid: int, proc: Path) -> tuple[int, int, int] | None:
    """Parent, process group and session."""
    try:
        text = (proc / str(pid) / "stat").read_bytes()
    except _GONE:
        return None
    fields = text[text.rindex(b")") + 2 :].split()
    return int(fields[1]), int(fields[2]), int(fields[3])


def _marks(pid: int, proc: Path) -> dict[bytes, bytes]:
    """What dynctl put into the environment of `pid`."""
    try:
        raw = (proc / str(pid) / "environ").read_bytes()
    except _GONE:
        return {}
    pairs = (item.partition(b"=") for item in raw.split(b"\0"))
    return {name: value for name, _, value in pairs if name in _MARKS}


def _name(pid: int, proc: Path) -> str:
    try:
        return (proc / str(pid) / "comm").read_text("utf-8", "replace").strip()
    except _GONE:
        return "gone"
