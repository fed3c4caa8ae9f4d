"""How long people wait: `dynctl --help`, `up -d` until ready, `down`. Prints a table.

    python -m tests.perf.lifecycle [--rounds N]

`--help` is measured against the bare interpreter in the same run. After each `down` the processes and
listening ports of the run are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dynctl.deploy.ports import listening
from tests.deployment import RECIPES, Cli, Deployment, owned

HELP_RUNS = 30


def seconds(command: list[str]) -> float:
    """Wall time of one command."""
    begun = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def interleaved(first: list[str], second: list[str], rounds: int) -> tuple[float, float]:
    """Medians of two commands run in turn, so that both see the same machine."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for kept, command in zip(times, (first, second), strict=True):
            kept.append(seconds(command))
    return statistics.median(times[0]), statistics.median(times[1])


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Wall time of a call, and what it gave."""
    begun = time.perf_counter()
    given = call()
    return time.perf_counter() - begun, given


def lifecycle(cli: Cli) -> tuple[float, float, int, int]:
    """Seconds to ready, seconds to down, processes and listening ports that are left."""
    recipe = str(RECIPES / "quickstart.yaml")
    to_ready, told = timed(lambda: cli.json("up", recipe, "-d", "--set", "frontend.port=0"))
    assert isinstance(told, dict)
    deployment = Deployment(cli, told["name"], told["url"], Path(told["run_dir"]))
    ports = {int(row["url"].rpartition(":")[2]) for row in deployment.ps()}
    to_down, done = timed(lambda: cli.run("down", deployment.name))
    assert isinstance(done, subprocess.CompletedProcess)
    assert done.returncode == 0, done.stderr
    return to_ready, to_down, len(owned(deployment.run_dir.name)), len(ports & set(listening()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    script = shutil.which("dynctl", path=os.path.dirname(sys.executable)) or "dynctl"
    bare, shown = interleaved([sys.executable, "-c", "pass"], [script, "--help"], HELP_RUNS)
    with tempfile.TemporaryDirectory() as home:
        runs = [lifecycle(Cli(Path(home))) for _ in range(rounds)]
    ready, down = ([run[i] for run in runs] for i in (0, 1))
    left = sum(run[2] for run in runs), sum(run[3] for run in runs)
    rows = [
        ("python -c pass", f"{bare * 1000:.0f} ms", ""),
        ("dynctl --help", f"{shown * 1000:.0f} ms, {shown / bare:.1f} x", "≤ 4 x"),
        ("up -d, ready (median)", f"{statistics.median(ready):.2f} s", "≤ 4 s"),
        ("up -d, ready (worst)", f"{max(ready):.2f} s", "≤ 4 s"),
        ("down (median)", f"{statistics.median(down):.2f} s", "≤ 3 s"),
        ("down (worst)", f"{max(down):.2f} s", "≤ 3 s"),
        ("left: processes, ports", f"{left[0]}, {left[1]}", "0, 0"),
    ]
    print(f"quickstart, {rounds} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    for what, got, limit in rows:
        print(f"  {what:<24} {got:<16} {limit}")


if __name__ == "__main__":
    main()
