"""The cluster of a test run: up, kept clean from test to test, and taken down whatever ends the run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tests.cluster import environment
from tests.cluster.commands import CommandFailed, Process, eventually, run
from tests.cluster.faults import Faults
from tests.cluster.hosts import HERE, UP_S
from tests.cluster.slurm import FINISHED, Job

PROGRAMS = ("ip", "nft", "tc", "pgrep", "ssh", "sshd", "munged", "slurmctld", "slurmd", "sbatch", "nsenter")
_ENDING_S = 0.5
"""What a test has ended may take this long to be gone."""
_KILLED_S = 15.0
_DOWN_S = 90.0
_TURN_S = 60.0
_TAIL_LINES = 40


def why_not() -> str:
    """Why there can be no cluster here; "" when there can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [p for p in PROGRAMS if not shutil.which(p, path="/usr/sbin:/usr/bin:/sbin:/bin")]
    if missing:
        return f"no {', '.join(missing)} here; install: tests/cluster/up.sh install"
    if environment.interpreter() is None:
        return "no Python with venv that every user can read; install: tests/cluster/up.sh install"
    return ""


class Cluster(Faults):
    """Real sshd hosts (head, n1..n4, priv) and a real Slurm on four of them."""

    def __init__(self, folder: Path, python: Path) -> None:
        super().__init__(folder, python)
        self._lasting: set[str] = set()
        self._past_jobs: set[tuple[str, str]] = set()

    @contextmanager
    def lasting(self, token: str) -> Iterator[None]:
        """Processes with `token` in their environment or arguments, jobs with it in their name, are declared.

        For what lives longer than one test, as a deployment of a module does. It is a left-over afterwards.
        """
        self._lasting.add(token)
        try:
            yield
        finally:
            self._lasting.discard(token)

    def clean(self) -> list[str]:
        """What a test has left behind, one line each; afterwards it is gone, and faults are repaired."""
        processes = self._left_processes()
        self._kill(processes)
        broken = []
        try:
            jobs = self._undeclared_jobs()
        except CommandFailed as error:  # The controller does not answer.
            if not self.faulted:
                broken = [str(error)]
            self.repair()
            jobs = self._undeclared_jobs()
        # A controller that was killed may take up a job that ended in an earlier test: nobody's left-over.
        told = [
            str(job)
            for job in jobs
            if job.state != "COMPLETING" and (job.id, job.submitted) not in self._past_jobs
        ]
        if jobs:
            self.scancel(*(job.id for job in jobs))
            eventually(lambda: not self._undeclared_jobs(), f"ended: {jobs}", _KILLED_S)
            self._kill(self._undeclared())
        if self.faulted:
            self.repair()
        return [*map(str, processes), *told, *broken]

    def log_sizes(self) -> dict[Path, int]:
        """The daemons' logs and how much is in them; none of a cluster that is down again."""
        return {path: path.stat().st_size for path in sorted((self.folder / "log").glob("*"))}

    def log_tails(self, since: dict[Path, int]) -> str:
        """The last lines that the daemons have written since `log_sizes`."""
        parts = []
        for path in self.log_sizes():
            if path.suffix == ".out":
                continue  # Standard output of a daemon that has a log: the same once more.
            with path.open("rb") as log:
                log.seek(since.get(path, 0))
                lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
            if lines:
                parts.append("\n".join([f"-- {path.name}", *lines]))
        return "\n".join(parts)

    def _left_processes(self) -> list[Process]:
        ends = time.monotonic() + _ENDING_S
        while (left := self._undeclared()) and time.monotonic() < ends:
            time.sleep(0.02)
        return left

    def _undeclared(self) -> list[Process]:
        return [p for p in self.processes() if not self._declared(p)]

    def _declared(self, process: Process) -> bool:
        try:
            environ = Path(f"/proc/{process.pid}/environ").read_bytes().decode(errors="replace")
        except OSError:
            environ = ""
        return any(token in environ or token in process.args for token in self._lasting)

    def _kill(self, processes: list[Process]) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        killed = {process.pid for process in processes}
        if killed:
            eventually(lambda: not killed & {p.pid for p in self.processes()}, f"ended: {killed}", _KILLED_S)

    def _undeclared_jobs(self) -> list[Job]:
        jobs = self.squeue(finished=True)
        self._past_jobs.update((job.id, job.submitted) for job in jobs if job.state in FINISHED)
        return [
            job
            for job in jobs
            if job.state not in FINISHED and not any(token in job.name for token in self._lasting)
        ]


@contextmanager
def running(python: Path) -> Iterator[Cluster]:
    """The cluster, up and whole; gone afterwards, unless it was up before.

    A keeper process takes it down when this one closes its pipe or dies, by whatever signal. One test run at
    a time has it: the others wait, then fail.
    """
    with _my_turn() as turn, tempfile.TemporaryFile() as said:
        already = _folder_of_running()
        folder = Path(already or _folder())
        keeper = None if already else _keeper(folder, turn, said)
        try:
            run([HERE / "up.sh"], timeout=UP_S, env={**os.environ, "DYNCTL_CLUSTER_DIR": str(folder)})
            yield Cluster(folder, python)
        finally:
            if keeper is not None:
                assert keeper.stdin is not None
                keeper.stdin.close()
                code = keeper.wait(_DOWN_S)
                said.seek(0)
                assert code == 0, f"down.sh: exit code {code}\n{said.read().decode(errors='replace')}"


def _folder_of_running() -> str:
    """The state of the cluster that is up, as its bridge tells; "" if there is none."""
    told = run(["ip", "-j", "link", "show", "dynbr0"], timeout=20, check=False)
    return str(json.loads(told.stdout)[0]["ifalias"]) if told.returncode == 0 else ""


def _folder() -> str:
    """Where the state goes; not into that of a cluster in another network namespace."""
    given = os.environ.get("DYNCTL_CLUSTER_DIR") or "/tmp/dynctl-cluster"
    for holder in Path(given).glob("hosts/*/pid"):
        with suppress(OSError):
            if b"dynhost-" in Path(f"/proc/{holder.read_text().strip()}/cmdline").read_bytes():
                return f"/tmp/dynctl-cluster-{os.getpid()}"
    return given


def _keeper(folder: Path, turn: socket.socket, said: IO[bytes]) -> subprocess.Popen[bytes]:
    """Its own session, so that Ctrl-C does not end it; it has `turn` until the cluster is down."""
    return subprocess.Popen(
        ["sh", "-c", 'cat >/dev/null; exec "$0"', HERE / "down.sh"],
        stdin=subprocess.PIPE,
        stdout=said,
        stderr=subprocess.STDOUT,
        env={**os.environ, "DYNCTL_CLUSTER_DIR": str(folder)},
        start_new_session=True,
        pass_fds=[turn.fileno()],
    )


@contextmanager
def _my_turn() -> Iterator[socket.socket]:
    """The machine's only cluster is this process's: a name that is free again when its holders are gone."""
    with socket.socket(socket.AF_UNIX) as turn:

        def bound() -> bool:
            try:
                turn.bind("\0dynctl-cluster-tests")
            except OSError:
                return False
            return True

        eventually(bound, "the cluster free (another test run has it)", _TURN_S)
        yield turn
