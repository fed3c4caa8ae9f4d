"""The Python with which the cluster's test user runs dynctl: `python -m tests.cluster.environment` builds it.

That user cannot read a checkout or an interpreter below a home of mode 700. So there are three environments
on an interpreter that everyone can read, under $DYNCTL_CLUSTER_CACHE (default /var/cache/dynctl-tests), each
named for the hash of what it is made of and stamped when complete: `build-`, pip and the build backend;
`needs-`, dynctl's dependencies as pyproject.toml names them; `dynctl-`, the wheel of this tree, on top of
`needs-`. So a change of the source costs one wheel, and no change costs reading the source.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_RECIPE = 1
"""Raise when a step below changes, so that older environments are built anew."""
_STAMP = ".complete"
_KEPT = 6
"""Environments of a kind that stay, the latest used: other checkouts have theirs here too."""
_BUILD_TIMEOUT_S = 600.0
_OLDEST = (3, 11)
_PROBE = "import ensurepip, sys; print(*sys.version_info[:3], sys.prefix)"


class BuildFailed(Exception):
    """A step of the build did not work; the message says which and why."""


def cache_folder() -> Path:
    """The folder that holds everything."""
    return Path(os.environ.get("DYNCTL_CLUSTER_CACHE") or "/var/cache/dynctl-tests")


@cache
def interpreter() -> tuple[Path, str] | None:
    """A Python that every user can read, new enough and able to make environments, with its version.

    None if there is none here.
    """
    names = [f"python3.{minor}" for minor in range(_OLDEST[1], 20)]
    found = [shutil.which(name, path="/usr/bin:/usr/local/bin") for name in names]
    base = getattr(sys, "_base_executable", sys.executable)
    for path in [Path("/usr/bin/python3"), *(Path(p) for p in [*found, base] if p)]:
        if not readable_by_all(path):
            continue
        done = subprocess.run([path, "-Ic", _PROBE], capture_output=True, text=True, timeout=60, check=False)
        *numbers, prefix = done.stdout.split() or ["0", "/"]
        if tuple(map(int, numbers)) >= _OLDEST and readable_by_all(Path(prefix)):
            return path, ".".join(numbers)
    return None


def readable_by_all(path: Path) -> bool:
    """Whether any user can enter every folder on the way to `path`, links followed, and read it."""
    try:
        real = path.resolve(strict=True)
        ways = all(p.stat().st_mode & 0o001 for p in real.parents)
        return ways and real.stat().st_mode & 0o005 == 0o005
    except OSError:
        return False


def build() -> Path:
    """The interpreter of the environment with this tree's dynctl, built as far as it is missing.

    Raises BuildFailed; what was complete stays usable.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    if not readable_by_all(folder):
        raise BuildFailed(f"{folder} cannot be entered by every user; set DYNCTL_CLUSTER_CACHE")
    chosen = interpreter()
    if chosen is None:
        raise BuildFailed(f"no Python >= {_OLDEST[0]}.{_OLDEST[1]} with venv that every user can read")
    base, version = chosen
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    backend: list[str] = project["build-system"]["requires"]
    needs: list[str] = project["project"]["dependencies"]
    common = [str(_RECIPE), str(base), version]
    with _alone(folder):
        builder = folder / f"build-{_hash(*common, *backend)}"
        if _starts(builder):
            _run([str(base), "-m", "venv", str(builder)])
            _pip(builder, builder, *backend)
            _complete(builder)
        under = folder / f"needs-{_hash(*common, *sorted(needs))}"
        if _starts(under):
            _run([str(base), "-m", "venv", "--without-pip", str(under)])
            _pip(builder, under, *needs)
            _complete(under)
        ours = folder / f"dynctl-{_hash(under.name, *contents(project))}"
        if _starts(ours):
            _run([str(base), "-m", "venv", "--without-pip", str(ours)])
            _install_wheel(builder, ours)
            (_site(ours) / "needs.pth").write_text(f"{_site(under)}\n", encoding="utf-8")
            _run([str(ours / "bin/python"), "-c", "import dynctl.cli.main, pydantic, zmq"])
            _complete(ours)
        _prune(folder)
    return ours / "bin/python"


def contents(project: dict[str, Any]) -> Iterator[str]:
    """Names and hashes of all that the wheel is made of."""
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    about = [
        "pyproject.toml",
        "hatch_build.py",
        project["project"]["readme"],
        *project["project"]["license-files"],
    ]
    for part in [*about, *wheel["packages"], *wheel["force-include"]]:
        top = ROOT / part
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                yield str(path.relative_to(ROOT))
                yield hashlib.sha256(path.read_bytes()).hexdigest()


def _install_wheel(builder: Path, into: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        pip = [str(builder / "bin/python"), "-m", "pip", "--disable-pip-version-check"]
        _run([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", scratch, str(ROOT)])
        _pip(builder, into, "--no-deps", *map(str, Path(scratch).glob("*.whl")))


def _pip(builder: Path, into: Path, *what: str) -> None:
    """Install with the pip of `builder`: the other environments have none, which makes them quick to make."""
    pip = [str(builder / "bin/python"), "-m", "pip", "--python", str(into / "bin/python")]
    _run([*pip, "--disable-pip-version-check", "install", "-q", *what])


def _hash(*what: str) -> str:
    return hashlib.sha256("\0".join(what).encode()).hexdigest()[:12]


def _starts(folder: Path) -> bool:
    """Whether `folder` has to be built; what an ended build left there is gone then."""
    stamp = folder / _STAMP
    if stamp.exists():
        os.utime(stamp)
        return False
    sys.stderr.write(f"building {folder}\n")
    shutil.rmtree(folder, ignore_errors=True)
    return True


def _complete(folder: Path) -> None:
    (folder / _STAMP).touch()


def _prune(folder: Path) -> None:
    for kind in ("build", "needs", "dynctl"):
        stamps = sorted(folder.glob(f"{kind}-*/{_STAMP}"), key=lambda p: p.stat().st_mtime)
        for stamp in stamps[:-_KEPT]:
            stamp.unlink()
            shutil.rmtree(stamp.parent)


def _site(folder: Path) -> Path:
    found = sorted(folder.glob("lib/python3.*/site-packages"))
    if not found:
        raise BuildFailed(f"{folder} has no site-packages")
    return found[0]


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False, umask=0o022
        )
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{' '.join(argv)}: no end after {_BUILD_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise BuildFailed(f"{' '.join(argv)}: exit code {done.returncode}\n{last}")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One builder at a time."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Build, then print the path of the interpreter."""
    try:
        python = build()
    except BuildFailed as error:
        sys.stderr.write(f"the cluster's Python: {error}\n")
        return 1
    sys.stdout.write(f"{python}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
