"""How a program is run on a host: on this machine, or over SSH."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol

from dynctl.errors import DeadlineExceeded, LaunchError
from dynctl.topology.inventory import LOCAL, Host

if TYPE_CHECKING:
    from dynctl.launchers.ssh import SshHosts


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


@asynccontextmanager
async def way_to(hosts: Sequence[Host], target: str) -> AsyncIterator[Runner | None]:
    """What reaches the hosts of a target, for as long as the context lasts; None = there is no way yet."""
    if is_here(hosts):
        yield LocalRunner()
    elif target == "slurm":
        yield None
    else:
        # SSH is not loaded where it is not used.
        from dynctl.launchers.ssh import SshHosts
        from dynctl.launchers.ssh_config import SshOptions

        async with SshHosts(SshOptions.find(os.environ)) as connections:
            yield SshRunner(connections)


def is_here(hosts: Sequence[Host]) -> bool:
    """Whether these hosts are this machine."""
    return [host.name for host in hosts] == [LOCAL]


class SshRunner:
    """Hosts reached over SSH, as the user's SSH configuration and the inventory say."""

    def __init__(self, connections: SshHosts) -> None:
        self._connections = connections

    async def run(
        self, host: Host, argv: Sequence[str], stdin: bytes, timeout_s: float
    ) -> tuple[int, bytes, bytes]:
        """See `Runner`: each host is dialled once."""
        shell = await self._connections.connect(host)
        done = await shell.run(argv, stdin=stdin, timeout_s=timeout_s)
        return done.code, done.stdout, done.stderr


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
