"""Who listens on which TCP port of this machine, read from /proc: nothing is bound, nobody is asked."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from dynctl import procfs

_LISTEN = "0A"
Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True)
class Listener:
    """One listening socket; `inode` tells which process holds it."""

    address: Address
    port: int
    inode: str

    def meets(self, host: str) -> bool:
        """Whether a server on `host` would get connections meant for this one, or the other way round.

        A name stands for any address, and so does "".
        """
        try:
            other = _unmapped(ip_address(host))
        except ValueError:
            return True
        return self.address.is_unspecified or other.is_unspecified or other == self.address


def listeners(proc: Path = procfs.PROC) -> list[Listener]:
    """All listening sockets, IPv4 and IPv6 (proc_net_tcp); [] where the kernel's tables are not there."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / table).read_text("ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN:
                address, _, port = fields[1].rpartition(":")
                found.append(Listener(_address(address), int(port, 16), fields[9]))
    return found


def holders(inodes: Collection[str], proc: Path = procfs.PROC) -> dict[str, list[int]]:
    """Socket inode → pids of the processes that hold it, ascending; those of other users are not there."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, list[int]] = {}
    if not wanted:
        return found
    for pid in procfs.pids(proc):
        for target in set(procfs.opened(pid, proc)):
            if target in wanted:
                found.setdefault(wanted[target], []).append(pid)
    return found


def _address(text: str) -> Address:
    """An address as the kernel prints it: words of four bytes in the machine's own order."""
    words = (int(text[at : at + 8], 16) for at in range(0, len(text), 8))
    raw = b"".join(word.to_bytes(4, sys.byteorder) for word in words)
    return IPv4Address(raw) if len(raw) == 4 else _unmapped(IPv6Address(raw))


def _unmapped(address: Address) -> Address:
    """An IPv4 address inside IPv6 as plain IPv4."""
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
