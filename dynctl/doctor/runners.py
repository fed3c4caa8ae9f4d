"""How a program is run on a host: on this machine here, over SSH or srun by whoever plugs that in."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

from dynctl.errors import DeadlineExceeded, LaunchError
from dynctl.topology.inventory import LOCAL, Host


class Runner(Protocol):
    """Runs programs on hosts."""

    async def run(
        self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """Exit code, standard output and standard error of a program on a host.

        Raises a DynctlError whose message says why the host could not be reached and whose hint what would
        help: DeadlineExceeded when it did not answer in time, what it ran being ended or left to its own end.
        """
        ...


def runner_for(hosts: Sequence[Host]) -> Runner | None:
    """What reaches these hosts; None = there is no way to them yet."""
    return LocalRunner() if all(host.name == LOCAL for host in hosts) else None


class LocalRunner:
    """This machine, whatever the host."""

    async def run(
        self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """See `Runner`. What has not ended in time is killed, with all of its group."""
        try:
            child = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(
                f"{argv[0]} cannot be run: {error.strerror or error}", where=host.name
            ) from error
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await child.communicate(stdin)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer after {timeout_s:.0f} s", where=host.name) from error
        finally:
            if child.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        return child.returncode or 0, out, err
