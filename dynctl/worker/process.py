"""The engine as a child process: in a group of its own, gone when its sidecar is gone, however that ended."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol

import msgspec

from dynctl.errors import LaunchError
from dynctl.protocol.specs import EngineProcess
from dynctl.worker.inherited import Inherited
from dynctl.worker.step import engine_argv, engine_environment

logger = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 256 * 1024
_REAP_DEADLINE_S = 10.0
_GUARD = 'trap "" INT TERM HUP; read -r _ || kill -s KILL -- "-$1"'
"""Waits for a line, or for the end of the pipe when the sidecar has died: then kills the engine's group."""


class Process(Protocol):
    """A child process, as asyncio has it; `inherited.Inherited` is one too."""

    @property
    def pid(self) -> int: ...

    @property
    def returncode(self) -> int | None: ...

    async def wait(self) -> int: ...

    def send_signal(self, signal: int) -> None: ...

    def kill(self) -> None: ...


class Handle(msgspec.Struct, frozen=True, kw_only=True):
    """An engine as its sidecar knows it, to be known again after the sidecar's `execve`: see `handover`.

    `pipe` and `kv` are file descriptors: what its guard reads from, and what is known of its KV blocks.
    """

    pid: int
    guard_pid: int
    pipe: int
    kv: int
    log: str
    log_start: int


class EngineChild:
    """A started engine. `pid` leads its process group; `exit_code` is None while it runs."""

    def __init__(self, process: Process, guard: _Guard, log: Path, log_start: int) -> None:
        self.pid = process.pid
        self._process = process
        self._guard = guard
        self._log = log
        self._log_start = log_start

    @classmethod
    async def start(cls, engine: EngineProcess, log: Path) -> EngineChild:
        """Start it, output appended to `log`. Raises LaunchError when it cannot be started."""
        environment = engine_environment(engine.argv, engine.env, os.environ)
        argv = engine_argv(engine.argv, os.environ)
        cwd = engine.cwd or os.getcwd()
        program = find_program(argv[0], cwd, environment.get("PATH", os.defpath))
        try:
            log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _open_log(log) as output:
                log_start = output.tell()
                process = await asyncio.create_subprocess_exec(
                    program,
                    *argv[1:],
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output.fileno(),
                    stderr=output.fileno(),
                    cwd=cwd,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=_die_with(os.getpid()),
                )
        except OSError as error:
            raise LaunchError(f"cannot start the engine: {error}", where=program) from error
        child = cls(process, await _Guard.over(process.pid), log, log_start)
        logger.info("engine.started pid=%d program=%s", process.pid, program)
        return child

    @classmethod
    def inherit(cls, handle: Handle) -> EngineChild:
        """One that this process had before it became what it is. Raises LaunchError when it has ended."""
        os.set_inheritable(handle.pipe, False)
        guard = _Guard(Inherited(handle.guard_pid), handle.pipe)
        return cls(Inherited(handle.pid), guard, Path(handle.log), handle.log_start)

    def handle(self, log: Path, kv: int) -> Handle:
        """For `inherit` after an `execve`, which its guard's pipe outlives now. `log`: its log by then."""
        os.set_inheritable(self._guard.pipe, True)
        return Handle(
            pid=self.pid,
            guard_pid=self._guard.pid,
            pipe=self._guard.pipe,
            kv=kv,
            log=str(log),
            log_start=self._log_start,
        )

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self._log

    @property
    def exit_code(self) -> int | None:
        """Negative = ended by that signal."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until it has ended, whatever time that takes; returns the exit code."""
        return await self._process.wait()

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM to it, after `timeout_s` SIGKILL to its whole group; returns when nothing of it is left."""
        if self.exit_code is None and timeout_s > 0:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(timeout_s):
                    await self._process.wait()
            except TimeoutError:
                logger.warning("engine.killed pid=%d after_s=%g", self.pid, timeout_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        try:
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
        except TimeoutError:
            logger.error("engine.unkillable pid=%d", self.pid)
        await self._guard.release()

    def log_lines(self) -> list[str]:
        """The last lines this start has written."""
        try:
            with self._log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._log_start, end - _TAIL_BYTES))
                return file.read().decode("utf-8", "replace").splitlines()
        except OSError as error:
            return [f"(cannot read {self._log}: {error.strerror})"]


class _Guard:
    """A tiny process that outlives a killed sidecar just long enough to kill the engine's group."""

    def __init__(self, process: Process, pipe: int) -> None:
        self.pid = process.pid
        self.pipe = pipe
        self._process = process

    @classmethod
    async def over(cls, group: int) -> _Guard:
        """Watch over a process group. The script is a constant; the group is its only argument."""
        reader, writer = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                "/bin/sh",
                "-c",
                _GUARD,
                "dynctl-guard",
                str(group),
                stdin=reader,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            os.close(writer)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            raise LaunchError(
                f"cannot start the engine's guard: {error.strerror}", where="/bin/sh"
            ) from error
        finally:
            os.close(reader)
        return cls(process, writer)

    async def release(self) -> None:
        """End it without a kill."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.pipe, b"\n")
        os.close(self.pipe)
        try:
            async with asyncio.timeout(_REAP_DEADLINE_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()


def find_program(name: str, cwd: str, path: str) -> str:
    """The program's path, as the engine's own PATH finds it. Raises LaunchError when it is not there."""
    if not Path(cwd).is_dir():
        raise LaunchError("the engine's working directory does not exist", where=cwd)
    candidate = os.path.join(cwd, name) if os.sep in name else name
    found = shutil.which(candidate, path=path)
    if found is None:
        there = os.sep in name and Path(candidate).exists()
        what = f"{name} is not executable" if there else f"the engine's program {name!r} does not exist"
        raise LaunchError(what, where=candidate, hint="set engine.venv, engine.python or engine.container")
    return found


def _open_log(path: Path) -> BinaryIO:
    """For appending; readable for its owner alone, since engines may log what clients say."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def _die_with(parent: int) -> Callable[[], None]:
    """For the child, between fork and exec: have the kernel kill it when its parent dies."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec
