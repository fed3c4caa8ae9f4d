"""Several frontends of one deployment behind one port (SO_REUSEPORT), and nobody else.

The kernel lets any process of the same user join who asks for it, so that another deployment with the same
port would be given half of the connections without a word. Each frontend therefore looks who else is there.
"""

from __future__ import annotations

import os
from pathlib import Path

from dynctl import procfs
from dynctl.errors import PortInUse
from dynctl.listeners import holders, listeners
from dynctl.procfs import PROC

_RUN = "DYNCTL_RUN"
_LOOKS = 3


def require_own(host: str, port: int, proc: Path = PROC) -> None:
    """See that only processes of this run listen there. Raises PortInUse that says who else does.

    To be called before listening, so that nobody's connections are taken, and after it: of two that begin at
    the same time at least one sees the other.
    """
    others = strangers(host, port, proc)
    for _ in range(_LOOKS - 1):
        if not others:
            return
        # One of ours may have ended between the two looks at it: a socket with no holder is soon gone.
        others = {inode: who for inode, who in strangers(host, port, proc).items() if inode in others}
    if others:
        raise PortInUse(
            f"the port is in use by {', '.join(sorted(set(others.values())))}, not of this deployment",
            where=f"{host}:{port}",
            hint="stop what listens there, or choose another port",
        )


def strangers(host: str, port: int, proc: Path = PROC) -> dict[str, str]:
    """The sockets (inodes) that get connections to `host`:`port` and are not of this run: whose they are."""
    there = [one.inode for one in listeners(proc) if one.port == port and one.meets(host)]
    pids = holders(there, proc)
    found = {}
    for inode in there:
        pid = next(iter(pids.get(inode, ())), None)
        if pid is None:
            found[inode] = "a process of somebody else"
        elif pid != os.getpid() and not _of_this_run(pid, proc):
            found[inode] = f"{procfs.name(pid, proc) or 'a process'} (pid {pid})"
    return found


def _of_this_run(pid: int, proc: Path) -> bool:
    run = os.environ.get(_RUN)
    return bool(run) and procfs.environment(pid, proc).get(_RUN) == run
