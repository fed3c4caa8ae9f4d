"""Who listens on which TCP port of this machine, read from /proc: nothing is bound, nobody is asked."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

_LISTEN = "0A"
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket; `inode` tells which process holds it."""

    address: IPv4Address | IPv6Address
    port: int
    inode: str

    def meets(self, host: str) -> bool:
        """Whether a server on `host` would get connections meant for this one, or the other way round."""
        everywhere = self.address.is_unspecified or host in ("0.0.0.0", "::", "")
        return everywhere or host == str(self.address) or not _literal(host)


def listeners(proc: Path = PROC) -> list[Listener]:
    """All listening sockets, IPv4 and IPv6 (proc_net_tcp); [] where the kernel's tables are not there."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, _, port = fields[1].rpartition(":")
                found.append(Listener(_address(address), int(port, 16), fields[9]))
    return found


def holders(inodes: Collection[str], proc: Path = PROC) -> dict[str, int]:
    """Socket inode → pid of a process that holds it; those of other users are not there."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, int] = {}
    if not wanted:
        return found
    for entry in proc.iterdir():
        if entry.name.isdigit():
            for target in _opened(entry):
                if target in wanted:
                    found.setdefault(wanted[target], int(entry.name))
    return found


def name_of(pid: int, proc: Path = PROC) -> str:
    """A process for people: "python3 (pid 12)"."""
    try:
        name = (proc / str(pid) / "comm").read_text().strip()
    except OSError:
        name = "a process"
    return f"{name} (pid {pid})"


def _opened(process: Path) -> Iterator[str]:
    """What the descriptors of a process point at; nothing of one that is another user's, or gone."""
    with suppress(OSError):
        for descriptor in os.listdir(process / "fd"):
            with suppress(OSError):  # closed since
                yield os.readlink(process / "fd" / descriptor)


def _address(text: str) -> IPv4Address | IPv6Address:
    """An address as the kernel prints it: words of 32 bits, each with its bytes in the machine's order."""
    raw = bytes.fromhex(text)
    swapped = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    if len(swapped) == 4:
        return IPv4Address(swapped)
    address = IPv6Address(swapped)
    return address.ipv4_mapped or address


def _literal(host: str) -> bool:
    return ":" in host or host.replace(".", "").isdigit()
