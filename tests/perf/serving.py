"""The serving path beside its peers: one run, one machine, medians of alternating rounds.

    python -m tests.perf.peers build                       once: the peers' environments
    python -m tests.perf.serving [--only relay,request] [--proxies "haproxy,dynctl kv"] [--rounds 3] [--write]

Parts (each takes less than 5 minutes):

    relay     CPU per relayed token: 32 streams, 400 tokens each, at 150 tokens a second a stream
    request   CPU per request: a prompt of 64 words, 2 tokens out
    long      the same with 4,000 words
    shared    the same with 4,000 words of which 90 % are one of four common beginnings
    latency   added to the time to first token at low load: 1,000 tokens in, 10 requests a second
    streams   1,000 streams at once: what fails, and the memory
    huge      60,000 tokens, 90 % shared, 40 requests a second on one core: what is added to the first token

CPU is that of the proxy's processes, all threads (/proc/PID/task/*/schedstat), between the first and the last
request. Ratios are to HAProxy in the same run. `reads` are the client's per token: below 1 where tokens are
kept back. `--write` puts the tables into docs/performance.md, part by part.
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
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from dynctl.worker.kv_relay import GATHER_S
from tests.perf.load import SHAPES, Load, Outcome
from tests.perf.peers import PROXIES, Running, Setting, await_serving, free_port, missing, temporary
from tests.perf.stand_in import BLOCK, ROOT

RESULTS = ROOT / "docs" / "performance.md"
ENGINES = 4
TOKENS_A_WORD = 1.13
"""Of the load's words, by the tiny model's tokenizer."""
BASE = "haproxy"
ROUTERS = (BASE, "dynctl kv", "sglang-router", "vllm-router", "ai-dynamo")
LOAD_DEADLINE_S = 280


@dataclass(frozen=True)
class Part:
    """What is asked, of whom, and with which engine. `per`: what CPU is counted per."""

    title: str
    load: Load
    per: str = "request"
    proxies: tuple[str, ...] = ROUTERS
    engine: tuple[str, ...] = ("--rate", "150", "--pace", "spread")
    rounds: int = 3
    one_core: bool = False
    direct: bool = False

    def told(self) -> tuple[float, float]:
        """Batches of KV events a second, and blocks stored (and removed) a second, that this load makes: a
        request's own prompt and its answer, in batches as sidecars gather them, two a request at most.
        """
        rate = float(self.engine[self.engine.index("--rate") + 1])
        load = self.load
        own_tokens = SHAPES[load.prompt][0] * TOKENS_A_WORD + load.max_tokens
        requests = load.rate or load.streams * rate / load.max_tokens
        return min(ENGINES / GATHER_S, 2 * requests), requests * own_tokens / BLOCK


PARTS: dict[str, Part] = {
    "relay": Part(
        "CPU per relayed token: 32 streams, 400 tokens each, 150 tokens/s a stream",
        Load(port=0, streams=32, requests=2, max_tokens=400),
        per="token",
        proxies=(
            BASE,
            "haproxy-held",
            "dynctl.http",
            "dynctl least_loaded",
            "dynctl kv",
            "sglang-router",
            "vllm-router",
            "ai-dynamo",
        ),
        engine=("--rate", "150", "--pace", "steps"),
    ),
    "answers": Part(
        "CPU per relayed token of long answers: 32 streams, 2,000 tokens each, 150 tokens/s a stream",
        Load(port=0, streams=32, max_tokens=2_000),
        per="token",
        proxies=(BASE, "dynctl.http", "dynctl kv", "sglang-router", "vllm-router", "ai-dynamo"),
        engine=("--rate", "150", "--pace", "steps"),
    ),
    "request": Part(
        "CPU per request: 64 words in, 2 tokens out", Load(port=0, rate=100, duration_s=4, max_tokens=2)
    ),
    "long": Part(
        "CPU per request: 4,000 words in, 2 tokens out", Load(port=0, prompt="long", rate=15, duration_s=4)
    ),
    "shared": Part(
        "CPU per request: 4,000 words in, 90 % of them shared, 2 tokens out",
        Load(port=0, prompt="shared", rate=15, duration_s=4),
    ),
    "latency": Part(
        "Time to first token at low load: 1,000 tokens in, 10 requests/s",
        Load(port=0, prompt="1k", rate=10, duration_s=5),
        direct=True,
    ),
    "streams": Part(
        "1,000 streams at once, 50 tokens each, 10 tokens/s a stream",
        Load(port=0, streams=1000, requests=1, max_tokens=50),
        per="token",
        proxies=(BASE, "dynctl kv", "sglang-router", "vllm-router"),
        engine=("--rate", "10", "--pace", "spread"),
    ),
    "huge": Part(
        "60,000 tokens in, 90 % shared, 40 requests/s, the proxy on one core",
        Load(port=0, prompt="huge", rate=40, duration_s=5),
        proxies=(BASE, "dynctl kv", "ai-dynamo"),
        one_core=True,
        direct=True,
    ),
}


@dataclass(frozen=True)
class Sample:
    """One proxy in one round: CPU in seconds, resident memory in bytes."""

    outcome: Outcome
    cpu_s: float
    memory_bytes: int

    def us_per(self, per: str) -> float:
        """CPU microseconds per token or request."""
        return self.cpu_s / max(1, self.outcome.tokens if per == "token" else self.outcome.done) * 1e6


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def measured(one: Running) -> list[int]:
    """The processes whose CPU counts: not the stand-in beside a frontend, which is its child."""
    return [pid for pid in family(one.measured.pid) if b"--beside" not in _command(pid)]


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def cpu_s(pids: Iterable[int]) -> float:
    """CPU seconds of processes, all threads that live."""
    tasks = (task for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def memory_bytes(pids: Iterable[int]) -> int:
    """Resident memory of processes."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf(
        "SC_PAGESIZE"
    )


def to_one_core(pids: Iterable[int]) -> None:
    """Keep processes, all their threads, on the last core."""
    core = {max(os.sched_getaffinity(0))}
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), core)


def ask(load: Load) -> Outcome:
    """Run the load client in its own process."""
    argv = [sys.executable, "-m", "tests.perf.load", msgspec.json.encode(load).decode()]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, timeout=LOAD_DEADLINE_S, text=True)
    if done.returncode:
        raise SystemExit(f"the load client failed: {done.stderr[-2000:]}")
    return msgspec.json.decode(done.stdout, type=Outcome)


def start_engines(part: Part) -> tuple[subprocess.Popen[Any], list[int]]:
    """The scripted engine; its process and its ports."""
    argv = [sys.executable, "-m", "tests.perf.scripted_engine", "--ports", str(ENGINES), *part.engine]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(port) for port in process.stdout.readline().split()]


def sample(one: Running, part: Part, seed: int) -> Sample:
    """Measure one proxy once."""
    pids = measured(one)
    before = cpu_s(pids)
    outcome = ask(msgspec.structs.replace(part.load, port=one.port, seed=seed))
    return Sample(outcome, cpu_s(pids) - before, memory_bytes(pids))


def run_part(part: Part) -> dict[str, list[Sample]]:
    """All proxies of a part, in alternating rounds."""
    engine, ports = start_engines(part)
    started: dict[str, Running] = {}
    results: dict[str, list[Sample]] = {name: [] for name in part.proxies}
    if part.direct:
        results = {"engine itself": [], **results}
    try:
        with temporary() as folder:
            setting = Setting(ports, Path(folder), part.per == "token", part.told())
            for name in part.proxies:
                started[name] = PROXIES[name](free_port(), setting)
            try:
                for name, one in started.items():
                    _warm(name, one, part)
                if part.direct:
                    started["engine itself"] = Running(ports[0], engine)
                for number in range(part.rounds):
                    for name in results:
                        results[name].append(sample(started[name], part, seed=number + 1))
                        print(".", end="", flush=True, file=sys.stderr)
            finally:
                for name in part.proxies:
                    started[name].stop()
    finally:
        engine.terminate()
        engine.wait(timeout=15)
    return results


def _warm(name: str, one: Running, part: Part) -> None:
    """Wait until it serves, and let it serve a few requests of this kind."""
    await_serving(one, name)
    warm = msgspec.structs.replace(
        part.load,
        port=one.port,
        rate=0,
        streams=min(32, part.load.streams * 4),
        requests=2,
        max_tokens=8,
        seed=1000,
    )
    outcome = ask(warm)
    if outcome.failed:
        raise SystemExit(f"{name} failed {outcome.failed} of its first requests: {outcome.error}")
    if part.one_core:
        to_one_core(measured(one))


def table(part: Part, results: dict[str, list[Sample]]) -> str:
    """Medians over the rounds, as Markdown."""
    cpu = {name: [one.us_per(part.per) for one in runs] for name, runs in results.items()}
    base = statistics.median(cpu[BASE]) if BASE in cpu else float("nan")
    direct = _ttft(results["engine itself"], 50) if "engine itself" in results else 0.0
    added = "added to first token p50, ms" if part.direct else "first token p50, ms"
    lines = [
        f"| | µs CPU/{part.per} | min, max | to HAProxy | {added} | p99, ms | reads/token | failed | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        own = name == "engine itself"
        middle = statistics.median(cpu[name])
        spent = [f"{middle:.1f}", f"{min(cpu[name]):.1f}, {max(cpu[name]):.1f}", f"{middle / base:.2f}"]
        tokens = sum(one.outcome.tokens for one in runs)
        cells = [
            name,
            *(["", "", ""] if own else spent),
            *(f"{_ttft(runs, percent) - (0.0 if own else direct):.2f}" for percent in (50, 99)),
            f"{sum(one.outcome.reads for one in runs) / max(1, tokens):.2f}",
            str(sum(one.outcome.failed for one in runs)),
            "" if own else str(round(max(one.memory_bytes for one in runs) / 2**20)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ttft(runs: list[Sample], percent: int) -> float:
    return statistics.median(one.outcome.ttft_ms(percent) for one in runs)


def conditions(rounds: int) -> str:
    """What a table was measured on."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    return (
        f"{when} UTC, {os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, "
        f"medians of {rounds} alternating rounds, load average {os.getloadavg()[0]:.1f} at the end"
    )


def write(name: str, section: str) -> None:
    """Put a part's section in place of its last one."""
    text = RESULTS.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        text += f"\n{begin}{end}"
    RESULTS.write_text(pattern.sub(lambda _: begin + section + "\n" + end, text))


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description="the serving path beside its peers")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--proxies", default="", help="of each part only these, comma-separated")
    parser.add_argument("--rounds", type=int, default=0, help="0: as many as the part has")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {RESULTS.name}")
    args = parser.parse_args()
    for name in args.only.split(","):
        part = PARTS[name]
        wanted = tuple(args.proxies.split(",")) if args.proxies else part.proxies
        absent = {one: missing(one) for one in wanted if missing(one)}
        for one, how in absent.items():
            print(f"not measured: {one} (first: {how})", file=sys.stderr)
        present = tuple(one for one in wanted if one not in absent)
        part = replace(part, proxies=present, rounds=args.rounds or part.rounds)
        section = f"### {part.title}\n\n{table(part, run_part(part))}\n\n{conditions(part.rounds)}."
        print(f"\n{section}\n", flush=True)
        if args.write:
            write(name, section)


if __name__ == "__main__":
    main()
