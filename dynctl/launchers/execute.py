"""Runs one command of a user's beside a process of a run, to its end."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

from dynctl.errors import DeadlineExceeded, LaunchError
from dynctl.launchers.base import Launch
from dynctl.launchers.local import environment_for
from dynctl.protocol.day2 import ExecReply

KEPT_BYTES = 1 << 20


async def execute(launch: Launch, run_id: str, timeout_s: float) -> ExecReply:
    """What it said and ended with. Raises LaunchError when it cannot be started, DeadlineExceeded when it has
    not ended in time: then all of it is killed.
    """
    command = launch.command
    try:
        child = await asyncio.create_subprocess_exec(
            *command.argv,
            env=environment_for(launch, run_id),
            cwd=command.cwd,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise LaunchError(f"{command.argv[0]} cannot be started: {reason}", where=launch.node) from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await child.communicate()
    except TimeoutError:
        message = f"{command.argv[0]} had not ended after {timeout_s:g} s and was killed"
        raise DeadlineExceeded(message, where=launch.node, hint="--timeout gives it more") from None
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    return ExecReply(code=child.returncode or 0, stdout=out[-KEPT_BYTES:], stderr=err[-KEPT_BYTES:])
