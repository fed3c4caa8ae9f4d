"""A child process that was started before this process became another program by `execve`."""

from __future__ import annotations

import asyncio
import os
import signal

from dynctl.errors import LaunchError


class Inherited:
    """Watched by its pidfd, and reaped when it has ended: it is a child still. Make it inside a running loop.

    `returncode` is None while it runs, negative for a signal. Raises LaunchError when it has been reaped.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        try:
            self._fd = os.pidfd_open(pid)
        except OSError as error:
            raise LaunchError(f"the process {pid} has ended meanwhile: {error.strerror}") from error
        asyncio.get_running_loop().add_reader(self._fd, self._reap)

    async def wait(self) -> int:
        """Wait until it has ended, whatever time that takes; returns the exit code."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signal: int) -> None:
        """Raises ProcessLookupError when it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError(self.pid)
        os.kill(self.pid, signal)

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        try:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
        except ChildProcessError:
            self.returncode = -signal.SIGKILL  # reaped by somebody else, who alone knows
        self._ended.set()
