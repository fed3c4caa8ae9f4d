"""Runs on a host that has no dynctl yet: what is missing of the files sent, and the installation itself.

Standard library only, read from standard input by the host's own Python: `python3 - '<json>'` prints one line
of JSON. An environment appears under its name when it is whole; who is late finds it there. A host that makes
one for a shared home is waited for as long as it gives signs of life.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BEAT_S = 3.0
_STALE_S = 20.0
_POLL_S = 0.3
_LOOK_S = 30.0
_LEFT_OVER_S = 3600.0


class Failed(Exception):
    """A message for people: `step` is what was being done."""

    def __init__(self, step: str, message: str) -> None:
        super().__init__(message)
        self.step = step


def missing(folder: Path, files: dict[str, str]) -> list[str]:
    """Which of these files (name → SHA-256) are not there, or have another content."""
    return [name for name, digest in files.items() if _digest(folder / name) != digest]


def require_room(folder: Path, needed_bytes: int) -> None:
    """See that there is at least so much room where the folder is to be. Raises Failed."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        told = f"{free / 1e6:.0f} MB are free, at least {needed_bytes / 1e6:.0f} MB are needed"
        raise Failed("looking for room", f"no space left on device {there}: {told}")


def install(asked: dict[str, Any]) -> str:
    """Make the environment `final` of the wheel, unless it is there. Raises Failed."""
    final, ends = Path(asked["final"]), time.monotonic() + float(asked["deadline_s"])
    folder, wheel = Path(asked["folder"]), Path(asked["folder"], asked["wheel"])
    if _digest(wheel) != asked["files"][asked["wheel"]]:
        raise Failed("checking the wheel", f"{wheel} is not what was sent (its SHA-256 differs)")
    if final.exists() and not _works(final):
        _put_aside(final)
    with _alone(final, ends) as first:
        if not first:
            return "there"
        _sweep(final)
        draft = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            _make(draft, wheel, folder if asked["offline"] else None, ends)
            _move(draft, final)
            with contextlib.suppress(OSError):
                draft.rename(final)
            if not (final / "bin/python").exists():
                raise Failed("putting it in place", f"{final} cannot be made")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return "made"


def _make(draft: Path, wheel: Path, house: Path | None, ends: float) -> None:
    _run("making the environment", [sys.executable, "-m", "venv", "--without-pip", str(draft)], ends)
    python = str(draft / "bin/python")
    # By itself: when venv does it, nobody is told why it failed.
    _run("installing pip", [python, "-m", "ensurepip", "--default-pip"], ends)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    source = ["--no-index", "--find-links", str(house)] if house else ["--retries", "1", "--timeout", "15"]
    _run("installing", [*pip, "install", "--quiet", *source, str(wheel)], ends)


def _works(final: Path) -> bool:
    """Whether its Python still runs what is in it: not when the host's own Python has become another."""
    argv = [str(final / "bin/python"), "-c", "import importlib.metadata as m; m.version('dynctl')"]
    try:
        return subprocess.run(argv, capture_output=True, timeout=_LOOK_S, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _put_aside(final: Path) -> None:
    aside = final.with_name(f".{final.name}.broken.{os.getpid()}")
    with contextlib.suppress(OSError):
        final.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _run(step: str, argv: list[str], ends: float) -> None:
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PIP_REQUIRE_VIRTUALENV", "PIP_USER", "PIP_TARGET")
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=max(1.0, ends - time.monotonic()),
            env={**environ, "LC_ALL": "C", "PYTHONNOUSERSITE": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(step, "it did not end in time") from None
    if done.returncode:
        said = (done.stderr + b"\n" + done.stdout).decode("utf-8", "replace").splitlines()
        raise Failed(step, _telling([line.strip() for line in said if line.strip()], done.returncode))


def _telling(lines: list[str], code: int) -> str:
    """The line that says why: a full disk first of all, then pip's last word on it."""
    full = [line for line in lines if "no space left" in line.lower() or "quota exceeded" in line.lower()]
    errors = [line for line in lines if line.startswith("ERROR:") or "Error" in line]
    return (full[:1] or errors[-1:] or lines[-1:] or [f"exit code {code}"])[0]


def _move(draft: Path, final: Path) -> None:
    """Let the programs of the draft name the environment by the path it is going to have."""
    old, new = str(draft).encode(), str(final).encode()
    for path in (draft / "bin").iterdir():
        if path.is_symlink() or not path.is_file():
            continue
        content = path.read_bytes()
        if old in content and b"\0" not in content[:256]:
            path.write_bytes(content.replace(old, new))


@contextlib.contextmanager
def _alone(final: Path, ends: float) -> Iterator[bool]:
    """Be the one who makes it: False when another has. Only saves work: putting it in place is atomic."""
    final.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = final.with_name(f".{final.name}.lock")
    while not (final / "bin/python").exists():
        try:
            lock.mkdir()
        except FileExistsError:
            if _stale(lock):
                with contextlib.suppress(OSError):
                    lock.rmdir()
            elif time.monotonic() > ends:
                raise Failed("waiting for another host that installs", f"{lock} is still held") from None
            else:
                time.sleep(_POLL_S)
            continue
        stop = threading.Event()
        beat = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
        beat.start()
        try:
            yield not (final / "bin/python").exists()
        finally:
            stop.set()
            beat.join(_BEAT_S)
            with contextlib.suppress(OSError):
                lock.rmdir()
        return
    yield False


def _beat(lock: Path, stop: threading.Event) -> None:
    while not stop.wait(_BEAT_S):
        with contextlib.suppress(OSError):
            os.utime(lock)


def _stale(lock: Path) -> bool:
    """Whether nobody has given a sign of life: measured by the clock of the file system it is on."""
    probe = lock.with_name(f"{lock.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime - lock.stat().st_mtime > _STALE_S
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _sweep(final: Path) -> None:
    """Remove what killed installations of the same environment have left."""
    now = time.time()
    for path in final.parent.glob(f".{final.name}.*.*"):
        with contextlib.suppress(OSError):
            if path.is_dir() and now - path.stat().st_mtime > _LEFT_OVER_S:
                shutil.rmtree(path, ignore_errors=True)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def main(argv: list[str]) -> None:
    """Do what the JSON in argv[0] asks for; print {"ok": ...} or {"step": ..., "error": ...}."""
    asked = json.loads(argv[0])
    try:
        answer: Any
        if asked["do"] == "missing":
            require_room(Path(asked["folder"]), int(asked["needed_bytes"]))
            answer = missing(Path(asked["folder"]), asked["files"])
        else:
            answer = install(asked)
        told = {"ok": answer}
    except Failed as error:
        told = {"step": error.step, "error": str(error)}
    except OSError as error:
        told = {"step": "installing", "error": f"{error.strerror or error}: {error.filename or ''}"}
    sys.stdout.write("\n" + json.dumps(told) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
