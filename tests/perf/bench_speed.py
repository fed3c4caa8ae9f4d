"""Tokens a second that one core of the load generator takes: `python -m tests.perf.bench_speed [--write]`.

The load of `dynctl bench` against the scripted engine, in a process of its own: so many streams at a set pace
that the client is far from a full core. Tokens a second per core are the tokens received over the CPU that
the client took meanwhile (schedstat, all threads). `--write` puts the table into docs/profiling.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from dynctl.http.runtime import run as run_loop
from dynctl.profiler.load.run import Watch, run
from dynctl.profiler.load.spec import Closed, Endpoint, Lengths, Load

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "docs" / "profiling.md"
TOKENS = 400
WANTED = 20_000
CASES = {
    "steps: all streams at once, 32 x 150 tokens/s": ("steps", 32, 150),
    "spread: each by itself, 32 x 150 tokens/s": ("spread", 32, 150),
    "spread: each by itself, 256 x 30 tokens/s": ("spread", 256, 30),
}


def cpu_s() -> float:
    """CPU seconds of this process, all threads that live."""
    tasks = Path("/proc/self/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


async def client(url: str, streams: int) -> dict[str, float]:
    """Send the load; tokens, seconds of CPU from the first send on, and what the client says of itself."""
    load = Load(
        arrivals=Closed(concurrency=streams),
        requests=2 * streams,
        isl=Lengths(tokens=64),
        osl=Lengths(tokens=TOKENS),
        seed=1,
    )
    begun_s = cpu_s()
    measured = await run(load, Endpoint(url=url, model="tiny"), Watch())
    used_s = cpu_s() - begun_s
    tokens = sum(record.output_tokens for record in measured.records)
    assert tokens == 2 * streams * TOKENS
    return {"tokens": tokens, "cpu_s": used_s, "lag_p95_s": measured.result.client.lag_p95_s}


def round_of(pace: str, streams: int, rate: int) -> dict[str, float]:
    """One case once, engine and client each in its own process."""
    argv = [sys.executable, "-m", "tests.perf.scripted_engine", "--tokens", str(TOKENS)]
    argv += ["--pace", pace, "--rate", str(rate)]
    engine = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None
        url = f"http://127.0.0.1:{engine.stdout.readline().strip()}"
        told = subprocess.run(
            [sys.executable, "-m", "tests.perf.bench_speed", "--client", url, "--streams", str(streams)],
            cwd=ROOT,
            capture_output=True,
            timeout=120,
            check=False,
        )
        if told.returncode:
            raise SystemExit(f"the client failed: {told.stderr.decode()[-2000:]}")
        found: dict[str, float] = msgspec.json.decode(told.stdout)
        return found
    finally:
        engine.terminate()
        engine.wait(timeout=15)


def table(rounds: int) -> str:
    """All cases, as Markdown."""
    lines = ["| load | tokens/s per core | min, max | µs CPU/token | lag p95, ms |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        seen = [round_of(*case) for _ in range(rounds)]
        speeds = sorted(one["tokens"] / one["cpu_s"] for one in seen)
        middle = statistics.median(speeds)
        lag_ms = statistics.median(one["lag_p95_s"] for one in seen) * 1e3
        least_most = f"{speeds[0]:,.0f}, {speeds[-1]:,.0f}"
        lines.append(f"| {name} | {middle:,.0f} | {least_most} | {1e6 / middle:.1f} | {lag_ms:.1f} |")
    stamp = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    where = f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
    lines += ["", f"{stamp}, {where}, medians of {rounds} rounds, load average {os.getloadavg()[0]:.1f}."]
    return "\n".join(lines)


def write(name: str, section: str) -> None:
    """Put a section in place of its last one."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    text = RESULTS.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        text += f"\n{begin}{end}"
    RESULTS.write_text(pattern.sub(lambda _: begin + section + "\n" + end, text))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="how fast the load generator receives")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"put the table into {RESULTS.name}")
    parser.add_argument("--client", default="", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        print(msgspec.json.encode(run_loop(client(args.client, args.streams))).decode())
        return
    found = table(args.rounds)
    print(f"wanted: {WANTED:,} tokens/s per core\n\n{found}")
    if args.write:
        title = f"### What the load generator receives per core (wanted: {WANTED:,} tokens/s)"
        write("bench", f"{title}\n\n{found}")


if __name__ == "__main__":
    main()
