"""What a host has, asked by the one file that any of its Pythons can run."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dynctl import hostfacts
from dynctl.errors import CodecError, SshError
from dynctl.launchers.ssh_errors import python_error
from dynctl.launchers.ssh_host import SshHost
from dynctl.protocol.hosts import HostFacts, HostQuestion, read_facts


async def probe(
    ssh: SshHost, question: HostQuestion, *, python: str = "python3", timeout_s: float = 30.0
) -> HostFacts:
    """The facts of a host; nothing of dynctl has to be there. Raises SshError, HostPythonMissing."""
    source = await asyncio.to_thread(Path(hostfacts.__file__).read_bytes)
    argv = [python or "python3", "-", question.to_json()]
    done = await ssh.run(argv, stdin=source, timeout_s=timeout_s)
    if done.code != 0:
        raise python_error(ssh.name, argv[0], done.code, done.stderr)
    try:
        return read_facts(done.stdout)
    except CodecError as error:
        raise SshError(error.message, where=ssh.name) from error
