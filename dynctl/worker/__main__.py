"""`python -m dynctl.worker --spec FILE`: the sidecar of one engine.

Exit codes: 0 asked to end and has, 1 ended against its will (see `exits/<id>.json`), 2 called wrongly,
3 superseded.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import msgspec

from dynctl.errors import DynctlError, Superseded, UsageError
from dynctl.http.runtime import run
from dynctl.observability import logs
from dynctl.protocol.exits import LastWords
from dynctl.protocol.specs import WorkerSpec
from dynctl.worker.process import Handle
from dynctl.worker.service import Ending, Worker

logger = logging.getLogger("dynctl.worker")

_FAILED = 1
_USAGE = 2
_SUPERSEDED = 3


def main() -> int:
    """Run the sidecar; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m dynctl.worker", description="The sidecar of one engine.")
    parser.add_argument("--spec", required=True, type=Path, help="JSON file of a WorkerSpec")
    parser.add_argument("--engine", help="the engine that this process has already, as JSON")
    given = parser.parse_args()
    path = given.spec
    logs.setup(os.environ.get("DYNCTL_PROCESS", path.stem))
    try:
        spec = read_spec(path)
        incarnation = read_incarnation(os.environ.get("DYNCTL_INCARNATION", ""))
        inherited = read_handle(given.engine) if given.engine else None
    except DynctlError as error:
        logger.error("worker.refused %s", error)
        return _USAGE
    try:
        ending = run(_serve(spec, incarnation, inherited))
    except Exception as error:
        # Top of the process: whatever it was, the controller is to be told before we are gone.
        logger.exception("worker.failed")
        ending = Ending(DynctlError(f"{type(error).__name__}: {error}", where=spec.id))
    if ending is None:
        logger.info("worker.ended id=%s", spec.id)
        return 0
    logger.error("worker.ended id=%s %s", spec.id, ending.error)
    leave_last_words(spec.id, incarnation, ending)
    return _SUPERSEDED if isinstance(ending.error, Superseded) else _FAILED


async def _serve(spec: WorkerSpec, incarnation: int, inherited: Handle | None) -> Ending | None:
    return await Worker(spec, incarnation, inherited).run()


def read_spec(path: Path) -> WorkerSpec:
    """The spec in `path`. Raises UsageError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=WorkerSpec)
    except OSError as error:
        raise UsageError(f"cannot read the spec: {error.strerror}", where=str(path)) from error
    except msgspec.DecodeError as error:
        raise UsageError(f"not a worker's spec: {error}", where=str(path)) from error


def read_handle(text: str) -> Handle:
    """The engine that this process had before it became this seat's. Raises UsageError."""
    try:
        return msgspec.json.decode(text, type=Handle)
    except msgspec.DecodeError as error:
        raise UsageError(f"not an engine: {error}", where="--engine") from error


def read_incarnation(text: str) -> int:
    """The number in DYNCTL_INCARNATION. Raises UsageError."""
    if not text.isdecimal():
        raise UsageError(f"DYNCTL_INCARNATION is {text!r}", hint="a whole number, set by whoever starts this")
    return int(text)


def leave_last_words(seat: str, incarnation: int, ending: Ending) -> None:
    """Write `exits/<id>.json` in the run directory (the working directory)."""
    error = ending.error
    words = LastWords(
        id=seat,
        incarnation=incarnation,
        kind=error.kind,
        message=f"{error.message} ({error.hint})" if error.hint else error.message,
        exit_code=ending.exit_code,
        lines=list(ending.lines),
        permanent=ending.permanent,
    )
    try:
        words.save(Path.cwd())
    except OSError:
        logger.exception("last_words.unsaved id=%s", seat)


if __name__ == "__main__":
    sys.exit(main())
