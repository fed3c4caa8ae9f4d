"""Which TCP ports of this machine are taken, and by whom. Nothing is bound for long."""

from __future__ import annotations

import socket
from pathlib import Path

from dynctl.listeners import holders, listeners
from dynctl.procfs import PROC, name


def listening(proc: Path = PROC) -> set[int]:
    """The ports on which somebody listens, at whatever address."""
    return {listener.port for listener in listeners(proc)}


def listen_error(host: str, port: int) -> OSError | None:
    """Why a server could not listen there now; None when it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return error
    return None


def holder(port: int, proc: Path = PROC) -> str:
    """Who listens on a port, for people: "python3 (pid 12)"; "" when that cannot be read."""
    found = holders([listener.inode for listener in listeners(proc) if listener.port == port], proc)
    pid = min((pid for pids in found.values() for pid in pids), default=0)
    return f"{name(pid, proc) or 'a process'} (pid {pid})" if pid else ""
