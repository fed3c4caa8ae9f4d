"""Commands for the cluster's tests: each has a deadline, and what it says goes to files.

So a process that it leaves behind with its standard output open holds nobody up.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GRACE_S = 5.0
"""From the signal that ends a process to its end."""


class CommandFailed(AssertionError):
    """A command ended badly or not at all; the message has what it said."""


def run(
    argv: Sequence[str | Path],
    *,
    timeout: float,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    input: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run to the end. Raises CommandFailed when time is up, or with `check` for an exit code other than 0."""
    words = [str(word) for word in argv]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(input.encode())
        given.seek(0)

        def said(file: IO[bytes]) -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        process = subprocess.Popen(
            words, stdin=given, stdout=out, stderr=err, env=env, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(GRACE_S)
            if isinstance(error, subprocess.TimeoutExpired):
                text = f"{shlex.join(words)}: no end after {timeout} s\n{said(out)}{said(err)}"
                raise CommandFailed(text) from None
            raise
        done = subprocess.CompletedProcess(words, code, said(out), said(err))
    if check and code:
        raise CommandFailed(f"{shlex.join(words)}: exit code {code}\n{done.stdout}{done.stderr}")
    return done


def eventually(holds: Callable[[], bool], what: str, timeout: float) -> None:
    """Wait until `holds`. Raises CommandFailed with `what` when time is up."""
    ends = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > ends:
            raise CommandFailed(f"not within {timeout} s: {what}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Process:
    """A process of the test user. `pid` is the machine's number for it, which ends it from outside."""

    pid: int
    host: str
    args: str
    state: str

    def __str__(self) -> str:
        return f"{self.host}: {self.pid} [{self.state}] {self.args}"


@dataclass
class Spawned:
    """A command that runs in a host as the test user."""

    process: subprocess.Popen[bytes]
    out: Path
    entered: bool
    """It runs below the process that has entered the host."""

    @property
    def pid(self) -> int:
        """The machine's number of the command's own process."""
        return only_child(self.process.pid) if self.entered else self.process.pid

    def said(self) -> str:
        """Its standard output and error up to now."""
        return self.out.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, 128 + n when signal n ended it. Raises CommandFailed when time is up."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"no end after {timeout} s\n{self.said()}") from None
        return 128 - code if code < 0 else code


def only_child(pid: int) -> int:
    """The child of a process. Raises CommandFailed unless there is exactly one."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if len(children) != 1:
        raise CommandFailed(f"process {pid} has children {children}")
    return int(children[0])
