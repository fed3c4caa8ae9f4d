"""A sidecar becomes that of another seat: the same process by `execve`, its engine's parent as before.

What the kernel and launchers know of it holds on: its pid and start time, the signal that its engine gets
when it dies, the pipe by which the guard sees that. Its names are those of the new seat, in its environment
too, and so are its log and spec. All else begins anew, as with any start of a sidecar.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from dynctl.errors import LaunchError, UsageError
from dynctl.protocol.handover import ENV_TOOK, Become
from dynctl.protocol.specs import EngineProcess, WorkerSpec
from dynctl.worker.kv_relay import RankMemory
from dynctl.worker.process import EngineChild, Handle

logger = logging.getLogger(__name__)

_SEAT, _INCARNATION = "DYNCTL_PROCESS", "DYNCTL_INCARNATION"


@dataclass(frozen=True, slots=True)
class Next:
    """What a sidecar is to become."""

    spec: WorkerSpec
    incarnation: int


def next_of(spec: WorkerSpec, call: Become) -> Next:
    """What is asked for. Raises UsageError when the engine of `spec` cannot go on as that."""
    try:
        to = msgspec.json.decode(call.spec, type=WorkerSpec)
    except msgspec.DecodeError as error:
        raise UsageError(f"not a worker's spec: {error}", where=spec.id) from error
    if to.id != call.id or to.url != spec.url or _nameless(to.engine) != _nameless(spec.engine):
        raise UsageError(f"its engine is not that of {call.id}", where=spec.id)
    return Next(to, call.incarnation)


def become(was: tuple[str, int], to: Next, child: EngineChild, kv: list[RankMemory]) -> NoReturn:
    """Go on as `to`, in the run directory. `was`: seat and incarnation so far. Raises LaunchError."""
    seat = to.spec.id
    path = Path("specs") / f"{seat}.json"
    took = os.environ.get(ENV_TOOK) or f"{was[0]} {was[1]}"
    names = {_SEAT: seat, _INCARNATION: str(to.incarnation), ENV_TOOK: took}
    logger.info("worker.becomes id=%s incarnation=%d engine_pid=%d", seat, to.incarnation, child.pid)
    try:
        _write(path, msgspec.json.format(msgspec.json.encode(to.spec), indent=2) + b"\n")
        log = _moved_log(child.log, Path(to.spec.engine_log or f"logs/{seat}.engine.log"), to.incarnation)
        handle = msgspec.json.encode(child.handle(log, _in_memory(msgspec.msgpack.encode(kv)))).decode()
        _log_to(Path("logs") / f"{seat}.log")
        argv = [sys.executable, "-m", "dynctl.worker", "--spec", str(path), "--engine", handle]
        os.execve(sys.executable, argv, {**os.environ, **names})
    except OSError as error:
        raise LaunchError(f"{was[0]} cannot become {seat}: {error}", where=str(path)) from error


def kv_of(handle: Handle) -> list[RankMemory]:
    """What was known of the engine's blocks; told once. What cannot be read is asked of the engine again."""
    try:
        with os.fdopen(handle.kv, "rb") as file:
            file.seek(0)
            return msgspec.msgpack.decode(file.read(), type=list[RankMemory])
    except (OSError, msgspec.DecodeError) as error:
        logger.warning("kv_memory.unreadable error=%s", error)
        return []


def _in_memory(data: bytes) -> int:
    """A file descriptor for it that outlives `execve`."""
    descriptor = os.memfd_create("dynctl-kv", 0)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(data)
    return descriptor


def _nameless(engine: EngineProcess | None) -> object:
    """All of an engine but the seat it was started as; differs from all others when there is none."""
    if engine is None:
        return object()
    return engine.argv, {k: v for k, v in engine.env.items() if k != _SEAT}, engine.cwd


def _write(path: Path, text: bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(text)
    draft.replace(path)


def _moved_log(log: Path, to: Path, incarnation: int) -> Path:
    """The engine's log under its new name; it writes on into it. What has that name is kept beside it."""
    if to.exists():
        to.rename(to.with_name(f"{to.name.removesuffix('.log')}.before-{incarnation}.log"))
    log.rename(to)
    return to


def _log_to(path: Path) -> None:
    """Output goes there from now on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
