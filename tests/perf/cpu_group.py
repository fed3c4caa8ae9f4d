"""CPU time of all that a measurement starts, also of what outlives its starter: in a control group."""

from __future__ import annotations

import os
import re
from pathlib import Path

_V1 = Path("/sys/fs/cgroup/cpuacct")
_V2 = Path("/sys/fs/cgroup")


class CpuGroup:
    """This process and all it starts once it has entered."""

    def __init__(self) -> None:
        self._usage: Path | None = None
        self._home = _V2

    def enter(self) -> None:
        """Enter a group of its own; nothing happens where there are none to use."""
        for root, usage in ((_V1, "cpuacct.usage"), (_V2, "cpu.stat")):
            group = root / f"dynctl-perf-{os.getpid()}"
            if not (root / "cgroup.procs").exists():
                continue
            try:
                group.mkdir()
                (group / "cgroup.procs").write_text(str(os.getpid()))
                self._home, self._usage = root, group / usage
                break
            except OSError:
                continue

    def seconds(self) -> float | None:
        """CPU seconds used in the group; None without one."""
        if self._usage is None:
            return None
        text = self._usage.read_text()
        found = re.search(r"usage_usec (\d+)", text)
        return int(found[1]) / 1e6 if found else int(text) / 1e9

    def close(self) -> None:
        """Leave the group, and remove it if nothing is in it any more."""
        if self._usage is None:
            return
        (self._home / "cgroup.procs").write_text(str(os.getpid()))
        try:
            self._usage.parent.rmdir()
        except OSError:
            return  # the cluster was up before, or is on its way down
