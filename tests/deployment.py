"""A deployment for a test: `dynctl` as a user calls it, in a home of its own, ended whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


@dataclass(frozen=True)
class Cli:
    """Runs `dynctl` with its own DYNCTL_HOME."""

    home: Path
    env: Mapping[str, str] = field(default_factory=dict)

    def run(self, *args: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """One command line to its end; the exit code is the caller's to judge."""
        return subprocess.run(
            [sys.executable, "-m", "dynctl.cli.main", *args],
            env={**os.environ, "DYNCTL_HOME": str(self.home), **self.env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def json(self, *args: str, timeout_s: float = 60.0) -> Any:
        """One command line that must succeed, its standard output read as JSON."""
        done = self.run(*args, "--json", timeout_s=timeout_s)
        assert done.returncode == 0, (
            f"dynctl {' '.join(args)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return json.loads(done.stdout)


@dataclass(frozen=True)
class Deployment:
    """A deployment that is ready."""

    cli: Cli
    name: str
    url: str
    run_dir: Path

    def ps(self) -> list[dict[str, Any]]:
        """`dynctl ps --json`."""
        rows: list[dict[str, Any]] = self.cli.json("ps", self.name)
        return rows

    def workers(self, role: str) -> list[dict[str, Any]]:
        """The rows of one role, by index."""
        return sorted((r for r in self.ps() if r["role"] == role), key=lambda r: int(r["index"]))

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
        """Send JSON to the frontend, answer JSON; an HTTP error raises with its body."""
        return post(self.url + path, body, timeout_s)


def post(url: str, body: Mapping[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
    """Send JSON, answer JSON; an HTTP error raises with its body in the message."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{url}: {error.code} {error.read()[:500]!r}") from error
    return found


def get(url: str, timeout_s: float = 30.0) -> str:
    """The body of a GET as text."""
    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
        body: bytes = answer.read()
    return body.decode()


def counter(metrics: str, name: str, **labels: str) -> float:
    """Sum of a counter's series whose labels include `labels`; 0.0 when there is none."""
    total = 0.0
    for line in metrics.splitlines():
        found = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{k}="{v}"' in (found.group(1) or "") for k, v in labels.items()):
            total += float(found.group(2))
    return total


def eventually(check: Callable[[], bool], within_s: float = 30.0) -> bool:
    """Whether `check` holds before time is up."""
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if check():
            return True
        time.sleep(0.02)
    return False


def owned(run_id: str) -> list[int]:
    """Pids of living processes that carry this run's id in their environment."""
    return _carrying({f"DYNCTL_RUN={run_id}".encode()})


def end_all(home: Path, within_s: float = 10.0) -> None:
    """SIGKILL all that carries `home` as its DYNCTL_HOME or the id of a run in it, until nothing does."""
    runs = [p.name for p in (home / "runs").glob("[!.]*")]
    wanted = {f"DYNCTL_HOME={home}".encode(), *(f"DYNCTL_RUN={name}".encode() for name in runs)}
    ends = time.monotonic() + within_s
    while left := [pid for pid in _carrying(wanted) if pid != os.getpid()]:
        assert time.monotonic() < ends, f"cannot be ended: {left}"
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _carrying(wanted: Set[bytes]) -> list[int]:
    """Pids of living processes with any of these NAME=value in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if not wanted.isdisjoint((entry / "environ").read_bytes().split(b"\0")):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@contextmanager
def up(cli: Cli, recipe: Path | str, *args: str, timeout_s: float = 60.0) -> Iterator[Deployment]:
    """`dynctl up -d`, ready; `dynctl down` at the end, and nothing of it left running."""
    told = cli.json("up", str(recipe), "-d", "-y", *args, timeout_s=timeout_s)
    deployment = Deployment(cli, told["name"], told["url"], Path(told["run_dir"]))
    try:
        yield deployment
    finally:
        done = cli.run("down", deployment.name, timeout_s=90.0)
        left = owned(deployment.run_dir.resolve().name)
        assert done.returncode == 0, done.stderr
        assert not left, f"still running after down: {left}"


def sets(values: Mapping[str, object]) -> Sequence[str]:
    """`--set` arguments."""
    return [word for key, value in values.items() for word in ("--set", f"{key}={value}")]


def vllm_stand_in(python: str | Path) -> str:
    """An `engine.python` that is asked for vLLM (`-m vllm... serve MODEL ...`) and starts the simulated one,
    whose flags have the same names but for one.
    """
    return f"""#!/bin/sh
shift 3
for one; do
    shift
    [ "$one" = --enable-prompt-tokens-details ] || set -- "$@" "$one"
done
exec {python} -m dynctl.mocker "$@"
"""
