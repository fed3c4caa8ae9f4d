"""What a launcher is: it starts processes of a run, tells which have ended, signals them, finds what it owns.

A launcher knows nothing of roles, readiness or restarts. A process is known by its handle, never by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dynctl.command import Command

ENV_RUN = "DYNCTL_RUN"
ENV_PROCESS = "DYNCTL_PROCESS"
ENV_INCARNATION = "DYNCTL_INCARNATION"


@dataclass(frozen=True, slots=True)
class RunRef:
    """The run a process belongs to: its id and its directory (absolute)."""

    run_id: str
    run_dir: Path


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of one seat. `process_id` is the seat ("decode-0"), `node` where it is to run.

    `withheld` names variables of our own environment that it and what it starts are not to have.
    """

    process_id: str
    incarnation: int
    command: Command
    node: str = ""
    withheld: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ProcessHandle:
    """One process, safe against the reuse of its pid.

    `start_ticks` is the kernel's start time of the process in clock ticks since boot (field 22 of
    /proc/PID/stat): the same pid with other ticks is another process.
    """

    pid: int
    start_ticks: int
    pgid: int


@dataclass(frozen=True, slots=True)
class Exit:
    """A process that has ended. `code` is negative for a signal, None when it was not our child."""

    handle: ProcessHandle
    code: int | None


@dataclass(frozen=True, slots=True)
class Owned:
    """A living process of a run, found by its environment or as a descendant of one that was."""

    handle: ProcessHandle
    ppid: int
    process_id: str
    incarnation: int


class Launcher(Protocol):
    """Starts, watches and ends processes on one kind of target."""

    def start(self, launch: Launch, run: RunRef) -> ProcessHandle:
        """Start a process that outlives this one. Raises LaunchError when it cannot be started."""
        ...

    def poll(self, handles: Sequence[ProcessHandle]) -> list[Exit]:
        """Which of these have ended, in one batched look. Does not block."""
        ...

    def signal(self, handle: ProcessHandle, signum: int) -> bool:
        """Signal exactly this process; False when it is gone."""
        ...

    def owned(self, run_id: str) -> list[Owned]:
        """All living processes of this user that belong to the run."""
        ...

    def kill(self, victims: Iterable[Owned]) -> None:
        """SIGKILL these, by process group where the group is theirs."""
        ...

    def release(self, handle: ProcessHandle) -> None:
        """Forget a process that is to live on after this one."""
        ...


def heads(owned: Sequence[Owned]) -> list[Owned]:
    """Those not started by another process of the same seat: sidecars rather than engines."""
    seats = {o.handle.pid: o.process_id for o in owned}
    return [o for o in owned if seats.get(o.ppid) != o.process_id]
