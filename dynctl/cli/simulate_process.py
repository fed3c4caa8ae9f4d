"""The simulator runs as a process of its own: it imports the serving tower, which verbs must not."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import msgspec

from dynctl.cli.render import age
from dynctl.errors import ProfileError
from dynctl.perfmodel.simulation import Failed, Finished, Progress, Task, Told

_SILENT_S = 300.0
"""A run that tells of no progress for so long is given up."""
_READ = 1 << 16
_CLEAR = "\r\033[K"


def command(spec: Path) -> list[str]:
    """What runs the task in a file."""
    return [sys.executable, "-m", "dynctl.simulator", "--spec", str(spec)]


def results_of(task: Task, *, drawn: bool) -> list[Finished]:
    """All runs of a task, as they ended. `drawn`: progress is shown on standard error.

    Raises ProfileError: what the simulator refuses, that it died, or that it hangs.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="dynctl-simulate-") as folder:
        spec = Path(folder, "task.json")
        spec.write_bytes(msgspec.json.encode(task))
        with Path(folder, "errors").open("w+b") as errors:
            child = subprocess.Popen(command(spec), stdout=subprocess.PIPE, stderr=errors)
            meter = Meter()
            try:
                for told in _lines(child):
                    if isinstance(told, Failed):
                        raise ProfileError(told.message, where=told.where, hint=told.hint)
                    if isinstance(told, Finished):
                        found.append(told)
                    elif drawn:
                        sys.stderr.write(_CLEAR + meter.line(told, time.monotonic()))
                        sys.stderr.flush()
            finally:
                if drawn:
                    sys.stderr.write(_CLEAR)
                child.kill()
                child.wait()
                _pipe(child).close()
            if child.returncode:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise ProfileError(f"the simulator died, exit {child.returncode}", hint=last)
    return found


def _lines(child: subprocess.Popen[bytes]) -> Iterator[Told]:
    """What it prints, until it has ended."""
    rest, pipe = b"", _pipe(child).fileno()
    while True:
        if not select.select([pipe], [], [], _SILENT_S)[0]:
            raise ProfileError(f"the simulator has told nothing for {_SILENT_S:g} s", hint="a shorter trace")
        read = os.read(pipe, _READ)
        if not read:
            child.wait(_SILENT_S)
            return
        *whole, rest = (rest + read).split(b"\n")
        for line in whole:
            yield msgspec.json.decode(line, type=Told)


def _pipe(child: subprocess.Popen[bytes]) -> IO[bytes]:
    assert child.stdout is not None
    return child.stdout


class Meter:
    """How far the run is that goes on, and how long it will still take."""

    def __init__(self) -> None:
        self._policy = ""
        self._since_s = 0.0
        self._share = 0.0
        self._begun = 0.0

    def line(self, told: Progress, now_s: float) -> str:
        """oracle  43%  12s left."""
        if told.policy != self._policy or told.share < self._share:
            self._policy, self._since_s, self._begun = told.policy, now_s, told.share
        self._share = told.share
        done = told.share - self._begun
        left = f"  {age((1.0 - told.share) / done * (now_s - self._since_s))} left" if done > 0.0 else ""
        return f"{told.policy}  {told.share:.0%}{left}"
