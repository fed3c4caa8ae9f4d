"""`python -m tests.cluster.forward_verb CONFIG HOST WORD...`: a verb that runs on a host."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from dynctl.errors import SshError
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_terminal import forward
from tests.cluster.ssh_hosts import host


async def main(config: str, name: str, argv: list[str]) -> int:
    """The exit code."""
    async with SshHosts(SshOptions(configs=(Path(config),))) as ssh:
        return await forward(await ssh.connect(host(name)), argv)


if __name__ == "__main__":
    try:
        code = asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
    except SshError as error:
        sys.stderr.write(f"{error.kind}: {error}\n")
        code = 8
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
