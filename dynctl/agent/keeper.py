"""Starts the agent of a node anew when it dies: on its own node, since nobody else may be able to get there.

The keeper is the process that was started; the agent is its child. It imports nothing, so that it is small.
Should the keeper die, its agent goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

FIRST_S = 0.5
MOST_S = 30.0
STABLE_S = 60.0


def backoff_s(before_s: float, lived_s: float) -> float:
    """How long to wait before an agent is started again that has lived so long; `before_s`: the last wait."""
    if lived_s >= STABLE_S or not before_s:
        return FIRST_S
    return min(MOST_S, 2 * before_s)


def keep(agent: Callable[[], int]) -> int:
    """Run `agent` in a child, again and again until it ends by itself with 0; then 0.

    SIGTERM and SIGINT go on to the agent, which leaves; SIGHUP is ignored.
    """
    told = _Told()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, told.take)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    wait_s = 0.0
    while not told.to_end():
        began = time.monotonic()
        code = told.child_of(agent)
        if not code:
            return 0
        if told.to_end():
            break
        wait_s = backoff_s(wait_s, time.monotonic() - began)
        sys.stderr.write(f"agent.ended code={code}; started again in {wait_s:g} s\n")
        sys.stderr.flush()
        told.sleep(wait_s)
    return 0


class _Told:
    """The signal that this process was told to end with; the child has it too."""

    def __init__(self) -> None:
        self._signum = 0
        self._child = 0

    def take(self, signum: int, frame: FrameType | None) -> None:
        self._signum = signum
        if self._child:
            os.kill(self._child, signum)

    def to_end(self) -> bool:
        """Whether there has been one."""
        return bool(self._signum)

    def child_of(self, agent: Callable[[], int]) -> int:
        """The exit code of a child that runs `agent`; negative for a signal."""
        held = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, held)  # none is lost before the child is known or is ready
        self._child = os.fork()
        if not self._child:
            for signum in held:
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
            code = 1
            try:
                code = agent()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        # Not reaped before it is no longer known as the child: its pid cannot be another's when signalled.
        os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOWAIT)
        child, self._child = self._child, 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def sleep(self, seconds: float) -> None:
        """Until then, or until told to end."""
        ends = time.monotonic() + seconds
        while not self.to_end() and time.monotonic() < ends:
            time.sleep(min(0.2, max(0.0, ends - time.monotonic())))
