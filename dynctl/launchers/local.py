"""Processes on this machine: each in a session of its own, found again by its environment."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from dynctl import procfs
from dynctl.errors import LaunchError
from dynctl.launchers.base import (
    ENV_INCARNATION,
    ENV_PROCESS,
    ENV_RUN,
    Exit,
    Launch,
    Owned,
    ProcessHandle,
    RunRef,
)
from dynctl.launchers.files import write_atomic
from dynctl.protocol.handover import ENV_TOOK

logger = logging.getLogger(__name__)

KEEP_ENVIRON = {"SPT_NOENV": "1"}
"""Asks the setproctitle library to leave /proc/PID/environ readable: processes are found by it."""


class LocalLauncher:
    """Starts and ends processes of this user on this machine."""

    def __init__(self) -> None:
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, launch: Launch, run: RunRef) -> ProcessHandle:
        """Start a process that survives this one and its terminal.

        Its files are written first (0600), output goes to logs/<id>.log, its working directory is the run
        directory unless the command names another. Raises LaunchError.
        """
        argv = launch.command.argv
        try:
            write_files(run.run_dir, launch.command.files)
            with open_log(run.run_dir, launch.process_id) as log:
                child = subprocess.Popen(
                    argv,
                    env=environment_for(launch, run.run_id),
                    cwd=launch.command.cwd or run.run_dir,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise _cannot_start(launch, error) from error
        self._children[child.pid] = child
        stat = procfs.stat(child.pid)
        # Not reaped before poll(), so even a process that has already ended still has its ticks.
        ticks = stat.start_ticks if stat else 0
        logger.info("process.started id=%s pid=%s", launch.process_id, child.pid)
        return ProcessHandle(pid=child.pid, start_ticks=ticks, pgid=child.pid)

    def poll(self, handles: Sequence[ProcessHandle]) -> list[Exit]:
        """Which of these have ended; children are reaped."""
        exits = []
        for handle in handles:
            child = self._children.get(handle.pid)
            if child is not None:
                code = child.poll()
                if code is not None:
                    del self._children[handle.pid]
                    exits.append(Exit(handle, code))
            elif not procfs.alive(handle.pid, handle.start_ticks):
                exits.append(Exit(handle, None))
        return exits

    def signal(self, handle: ProcessHandle, signum: int) -> bool:
        """Signal exactly this process, by pidfd; False when it is gone."""
        try:
            fd = os.pidfd_open(handle.pid)
        except ProcessLookupError:
            return False
        try:
            # The descriptor is bound to the process that has the pid now: look at whose it is only after.
            if not procfs.alive(handle.pid, handle.start_ticks):
                return False
            signal.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    def owned(self, run_id: str) -> list[Owned]:
        """All living processes of the run: by DYNCTL_RUN in their environment, and their descendants.

        An engine that a sidecar has taken over is of the seat of that. This process is never among them.
        """
        stats = {pid: s for pid in procfs.pids_of_user(os.geteuid()) if (s := procfs.stat(pid)) and s.alive}
        stats.pop(os.getpid(), None)
        found: dict[int, Owned] = {}
        now_of: dict[tuple[str, int], tuple[str, int]] = {}
        for pid in list(stats):
            env = procfs.environment(pid)
            run = env.get(ENV_RUN)
            if run == run_id:
                names = env.get(ENV_PROCESS, ""), _number(env.get(ENV_INCARNATION))
                found[pid] = _owned(stats[pid], *names)
                if took := env.get(ENV_TOOK):
                    seat, _, incarnation = took.partition(" ")
                    now_of[seat, _number(incarnation)] = names
            elif run:
                del stats[pid]
        for pid, one in found.items():
            names = now_of.get((one.process_id, one.incarnation), (one.process_id, one.incarnation))
            found[pid] = _owned(stats[pid], *names)
        _add_descendants(found, stats)
        return [found[pid] for pid in sorted(found)]

    def kill(self, victims: Iterable[Owned]) -> None:
        """SIGKILL these; a whole process group at once where its leader is among them."""
        listed = list(victims)
        pids = {v.handle.pid for v in listed}
        for victim in listed:
            handle = victim.handle
            if handle.pgid in pids and handle.pgid == handle.pid and self.signal(handle, 0):
                try:
                    os.killpg(handle.pgid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError) as error:
                    logger.info("group.gone pgid=%s error=%s", handle.pgid, error)
            else:
                self.signal(handle, signal.SIGKILL)

    def release(self, handle: ProcessHandle) -> None:
        """Forget a child that is to live on."""
        child = self._children.pop(handle.pid, None)
        if child is not None:
            # Popen warns of a child that still runs when it is dropped; here that is the purpose.
            child.returncode = 0


def living_runs() -> set[str]:
    """The ids of all runs of which a process of this user lives here."""
    pids = procfs.pids_of_user(os.geteuid())
    alive = (pid for pid in pids if (stat := procfs.stat(pid)) is not None and stat.alive)
    return {procfs.environment(pid).get(ENV_RUN, "") for pid in alive} - {""}


def environment_for(launch: Launch, run_id: str) -> dict[str, str]:
    """What the process is started with: ours, the command's, and the three names by which it is found."""
    return {
        **{name: value for name, value in os.environ.items() if name not in launch.withheld},
        **KEEP_ENVIRON,
        **launch.command.env,
        ENV_RUN: run_id,
        ENV_PROCESS: launch.process_id,
        ENV_INCARNATION: str(launch.incarnation),
    }


def write_files(run_dir: Path, files: Mapping[str, str]) -> None:
    """Write the command's files (path relative to the run directory → text), each whole, mode 0600."""
    for relative, text in files.items():
        path = run_dir / relative
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, text)


def open_log(run_dir: Path, process_id: str) -> BinaryIO:
    """logs/<id>.log for appending: later incarnations go on where earlier ones ended."""
    folder = run_dir / "logs"
    folder.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    return os.fdopen(os.open(folder / f"{process_id}.log", flags, 0o600), "ab")


def _cannot_start(launch: Launch, error: OSError) -> LaunchError:
    program = launch.command.argv[0]
    reasons = {
        errno.ENOENT: f"no such program or directory: {error.filename or program}",
        errno.EACCES: f"no permission: {error.filename or program}",
        errno.ENOSPC: f"no space left on the device: {error.filename or ''}",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror}: {error.filename or program}")
    return LaunchError(f"{launch.process_id} could not be started: {reason}", where=launch.node)


def _owned(stat: procfs.Stat, process_id: str, incarnation: int) -> Owned:
    return Owned(ProcessHandle(stat.pid, stat.start_ticks, stat.pgid), stat.ppid, process_id, incarnation)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


def _add_descendants(found: dict[int, Owned], stats: dict[int, procfs.Stat]) -> None:
    """Add children of what was found, however deep: they may have thrown their environment away."""
    grown = True
    while grown:
        grown = False
        for pid, stat in stats.items():
            parent = found.get(stat.ppid)
            if pid not in found and parent is not None:
                found[pid] = _owned(stat, parent.process_id, parent.incarnation)
                grown = True
