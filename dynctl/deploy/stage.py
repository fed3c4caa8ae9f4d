"""`python -m dynctl.deploy.stage --from DIR --to DIR`: copies a model to this node's own disk, once.

Run on each node by one step of the job, before any engine starts. What is there, whole, is left alone.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from dynctl.deploy.disk import disk
from dynctl.errors import DynctlError, LaunchError

_COMPLETE = ".staged"
_LOCK_S = 3600.0
_LOCK_POLL_S = 0.2


def staged_path(source: str, stage: str) -> str:
    """Where a model directory goes below the stage directory: its name, and a mark of where it came from."""
    mark = hashlib.sha256(os.path.realpath(source).encode()).hexdigest()[:8]
    name = os.path.basename(os.path.realpath(source).rstrip("/"))
    return os.path.join(stage, f"{name}-{mark}")


def stage(source: Path, target: Path) -> int:
    """Copy the directory, links followed; the bytes copied, 0 when it is there. Raises LaunchError."""
    if not source.is_dir():
        raise LaunchError("there is no such model directory", where=str(source))
    with disk("the model cannot be copied"):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(target.parent / f".{target.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _locked(lock, target)
            return _copy(source, target)
        finally:
            os.close(lock)


def _copy(source: Path, target: Path) -> int:
    wanted = manifest(source)
    if (target / _COMPLETE).is_file() and (target / _COMPLETE).read_text() == wanted:
        return 0
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    shutil.rmtree(target, ignore_errors=True)
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    free = shutil.disk_usage(target.parent).free
    if free < size:
        hint = "free some, or let slurm.stage name a directory on a larger disk"
        told = f"too little space for the model: {free >> 20} of {size >> 20} MiB are free"
        raise LaunchError(told, where=str(target.parent), hint=hint)
    try:
        shutil.copytree(source, draft)
        (draft / _COMPLETE).write_text(wanted)
        draft.rename(target)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return size


def manifest(folder: Path) -> str:
    """Names, sizes and times of all files: the same for the same model."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found = path.stat()
            lines.append(f"{path.relative_to(folder)} {found.st_size} {found.st_mtime_ns}")
    return "\n".join(lines)


def _locked(lock: int, target: Path) -> None:
    ends = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                raise LaunchError(
                    "another job has been copying this model for too long", where=str(target)
                ) from None
            time.sleep(_LOCK_POLL_S)


def main() -> int:
    """Copy as told; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.deploy.stage")
    parser.add_argument("--from", dest="source", required=True, type=Path)
    parser.add_argument("--to", dest="target", required=True, type=Path)
    given = parser.parse_args()
    host, started = socket.gethostname(), time.monotonic()
    try:
        copied = stage(given.source, given.target)
    except DynctlError as error:
        sys.stderr.write(f"{host}: {error}\n")
        return 1
    took = time.monotonic() - started
    told = f"{copied >> 20} MiB copied in {took:.1f} s" if copied else "was there already"
    sys.stderr.write(f"{host}: {given.target}: {told}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
