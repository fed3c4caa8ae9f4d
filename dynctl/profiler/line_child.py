"""A child process that answers lines with lines, each within a deadline. It ends with who asks."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
import weakref
from collections.abc import Sequence
from typing import IO

from dynctl.errors import NotReady, ProcessExited, ProfileError

_LAST_LINES = 5


class LineChild:
    """One program. What it writes to standard error is kept for the message, should it die."""

    def __init__(self, name: str, argv: Sequence[str], deadline_s: float) -> None:
        """Start it. `name` stands for it in messages. Raises ProfileError when there is no such program."""
        self._name = name
        self._deadline_s = deadline_s
        self._read = b""
        # Closed by `_end`, which may come long after this method.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            # A session of its own: Ctrl-C is ours to handle.
            self._process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise ProfileError(f"cannot run {name}: {error.strerror}", where=argv[0]) from error
        self._finalizer = weakref.finalize(self, _end, self._process, self._errors)

    def ask(self, line: bytes) -> bytes:
        """Its answer. Raises ProcessExited when it ends instead, NotReady when the deadline passes."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # It has ended, maybe with a last answer: reading tells.
            self._process.stdin.write(line + b"\n")
        until = time.monotonic() + self._deadline_s
        while b"\n" not in self._read:
            piece = self._piece(until - time.monotonic())
            if not piece:
                raise self._died()
            self._read += piece
        answer, self._read = self._read.split(b"\n", 1)
        return answer

    def close(self) -> None:
        """End it."""
        self._finalizer()

    def _piece(self, left_s: float) -> bytes:
        assert self._process.stdout is not None
        if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
            self.close()
            raise NotReady(f"{self._name} has not answered within {self._deadline_s:.0f} s")
        return os.read(self._process.stdout.fileno(), 65536)

    def _died(self) -> ProcessExited:
        """What to raise once it has closed its standard output."""
        try:
            code: int | str = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            code = "none: it still runs"
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        return ProcessExited("\n".join([f"{self._name} ended, exit code {code}", *said[-_LAST_LINES:]]))


def _end(process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
    """Kill a process that holds nothing worth saving, and let go of its files."""
    process.kill()
    process.wait()
    for file in (process.stdin, process.stdout, errors):
        if file is not None:
            file.close()
