"""Real worker processes by the hundred: one process that has imported everything, and forks.

    python -m tests.integration.nursery

A line of JSON in (`{"kind": "engine"|"worker", "argv": [...], "env": {...}, "log": path}`), the pid out. A
child is what `python -m dynctl.mocker` or `python -m dynctl.worker` would be, in a session of its own and
without the imports. All die with the nursery, and it with its standard input: also if a test is killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_PR_SET_PDEATHSIG = 1
"""Linux: the signal a process gets when its parent ends."""


class Nursery:
    """The forking process, from outside."""

    def __init__(self, work_dir: Path) -> None:
        self._dir = work_dir
        self._process: subprocess.Popen[str] | None = None
        self.pids: list[int] = []

    def __enter__(self) -> Nursery:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.nursery"],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=self._dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in self.pids:
            send(pid, signal.SIGKILL)
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()

    def fork(self, kind: str, argv: Sequence[str], name: str, **env: str) -> int:
        """A new process; its pid. Its output goes to `name`.log in the work directory."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"kind": kind, "argv": list(argv), "env": env, "log": str(self._dir / f"{name}.log")}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline())
        self.pids.append(pid)
        return pid


def send(pid: int, number: signal.Signals) -> bool:
    """Signal a child; False when it has ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    """Fork as told until standard input ends."""
    import gc

    import dynctl.mocker.__main__
    import dynctl.mocker.service
    import dynctl.worker.__main__  # noqa: F401 - imported for the children

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _live(json.loads(line), sys.stdin)
        print(pid, flush=True)  # noqa: T201 - the answer to the order


def _live(order: dict[str, Any], orders: IO[str]) -> None:
    """The rest of a child's life."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDWR)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, target)
        os.environ.update(order["env"])
        sys.argv = [order["kind"], *order["argv"]]
        if order["kind"] == "engine":
            from dynctl.mocker.__main__ import main as engine

            code = engine()
        else:
            from dynctl.worker.__main__ import main as worker

            code = worker()
    except BaseException:
        # The end of the child, whatever ends it: it must never go back to the nursery's loop.
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
