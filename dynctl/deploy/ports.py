"""Which TCP ports of this machine are taken, and by whom. Read from /proc; nothing is bound for long."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_LISTEN = "0A"
PROC = Path("/proc")


def listening(proc: Path = PROC) -> dict[int, str]:
    """Port → inode of the socket that listens on it, IPv4 and IPv6 (proc_net_tcp)."""
    found: dict[int, str] = {}
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN:
                found[int(fields[1].rpartition(":")[2], 16)] = fields[9]
    return found


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
    inode = listening(proc).get(port)
    if inode is None:
        return ""
    wanted = f"socket:[{inode}]"
    for entry in proc.iterdir():
        if entry.name.isdigit() and _has_socket(entry, wanted):
            try:
                name = (entry / "comm").read_text().strip()
            except OSError:
                name = "a process"
            return f"{name} (pid {entry.name})"
    return ""


def _has_socket(process: Path, wanted: str) -> bool:
    try:
        return any(os.readlink(fd) == wanted for fd in (process / "fd").iterdir())
    except OSError:
        return False
