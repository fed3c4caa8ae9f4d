"""CPU a proxy spends per relayed token, against HAProxy's on the same work in the same run.

    python -m tests.perf.relay_cpu [--streams 32 --tokens 400 --rate 150 --pace steps --requests 4 --rounds 3]
                                   [--proxy NAME='COMMAND with {port} and {engine}'] ...

Processes: a scripted engine, a load client, and one proxy at a time. Each round measures every proxy once, in
turn, so that a machine that slows down slows all of them. CPU is utime + stime of the proxy process, from
/proc/PID/stat, between the first and the last request of a measurement. "reads" are the client's per token: 1
where each token arrives by itself when the engine sent it, less where a proxy keeps tokens back.

HAProxy is measured twice. By default it sends a chunked answer with MSG_MORE: the kernel keeps tokens back
for up to 200 ms and sends them together, which saves CPU and makes the stream stutter. "haproxy" has
`option http-no-delay`, with which it does the work that a token stream asks for: ratios are to this one.
"haproxy-held" is the default.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.relay import relay
from dynctl.http.runtime import run
from dynctl.http.server import Exchange, Limits, Request, serve

ROOT = Path(__file__).resolve().parents[2]
TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
PROMPT = json.dumps(
    {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "word " * 60}]}
).encode()

HAPROXY_CONFIG = """
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
  {option}
frontend in
  bind 127.0.0.1:{port}
  default_backend engine
backend engine
  server e0 127.0.0.1:{engine}
"""

# Gives the argument list that starts a proxy, for (port to listen on, engine's port, a folder for its files).
ProxyCommand = Callable[[int, int, Path], list[str]]


def haproxy_command(option: str) -> ProxyCommand:
    """HAProxy, one thread, as Debian ships it, with one more line of configuration."""

    def command(port: int, engine: int, folder: Path) -> list[str]:
        config = folder / f"haproxy-{port}.cfg"
        config.write_text(HAPROXY_CONFIG.format(port=port, engine=engine, option=option))
        return ["/usr/sbin/haproxy", "-db", "-q", "-f", str(config)]

    return command


def bare_relay_command(port: int, engine: int, folder: Path) -> list[str]:
    """Nothing but dynctl.http: server, client, relay."""
    return [sys.executable, "-m", "tests.perf.relay_cpu", "--as-relay", str(port), str(engine)]


def given_command(template: str) -> ProxyCommand:
    """A command line from --proxy, with {port} and {engine} filled in."""
    return lambda port, engine, folder: shlex.split(template.format(port=port, engine=engine, folder=folder))


PROXIES: dict[str, ProxyCommand] = {
    "haproxy": haproxy_command("option http-no-delay"),
    "haproxy-held": haproxy_command(""),
    "dynctl.http": bare_relay_command,
}


@dataclass(frozen=True)
class Cpu:
    """Seconds a process has spent in user space and in the kernel."""

    user_s: float
    system_s: float


@dataclass(frozen=True)
class Measurement:
    """One proxy in one round."""

    tokens: int
    reads: int
    cpu: Cpu
    wall_s: float

    @property
    def us_per_token(self) -> float:
        """CPU microseconds per relayed token."""
        return (self.cpu.user_s + self.cpu.system_s) / self.tokens * 1e6


async def bare_relay(port: int, engine: int) -> None:
    """Every request goes to the engine, every answer comes back as bytes. Serves until killed."""
    client = Client()
    origin = Origin("http", "127.0.0.1", engine)
    timeouts = Timeouts()

    async def handle(request: Request, exchange: Exchange) -> None:
        stream = await client.open(
            origin,
            request.method,
            request.target,
            headers=request.headers,
            body=request.body,
            timeouts=timeouts,
        )
        await relay(stream, exchange)

    await serve(handle, host="127.0.0.1", port=port, limits=Limits())
    await asyncio.Event().wait()


class Counter:
    """Counts the events of a stream; an event begins with "data: " and may be split anywhere."""

    def __init__(self) -> None:
        self.tail = b""
        self.events = 0
        self.reads = 0

    def feed(self, data: bytes) -> None:
        """Count."""
        self.reads += 1
        joined = self.tail + data
        self.events += joined.count(b"data: {")
        self.tail = joined[-6:]


async def one_stream(client: Client, origin: Origin, requests: int, counter: Counter) -> None:
    """Ask `requests` times, one after another."""
    for _ in range(requests):
        stream = await client.open(
            origin,
            "POST",
            "/v1/chat/completions",
            headers=[(b"content-type", b"application/json")],
            body=PROMPT,
            timeouts=Timeouts(first_byte_s=30, stall_s=30),
        )
        if stream.status != 200:
            raise SystemExit(f"the proxy answered {stream.status}: {(await stream.read(10_000))[:300]!r}")
        await stream.relay(counter)


async def load(port: int, streams: int, requests: int) -> None:
    """The load client: prints how many tokens came, and in how many reads."""
    client = Client()
    origin = Origin("http", "127.0.0.1", port)
    counters = [Counter() for _ in range(streams)]
    await asyncio.gather(*(one_stream(client, origin, requests, counter) for counter in counters))
    await client.close()
    print(sum(one.events for one in counters), sum(one.reads for one in counters), flush=True)


def cpu_of(pid: int) -> Cpu:
    """utime and stime of a process, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Cpu(int(fields[11]) / TICKS_A_SECOND, int(fields[12]) / TICKS_A_SECOND)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def await_port(port: int, process: subprocess.Popen[bytes], deadline_s: float = 20.0) -> None:
    """Wait until something listens."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"{process.args!r} exited with {process.returncode}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"nothing listens on port {port} after {deadline_s:g} s")


def run_load(port: int, streams: int, requests: int) -> tuple[int, int]:
    """Run the load client in its own process; give back the tokens it received, and its reads."""
    argv = [sys.executable, "-m", "tests.perf.relay_cpu", "--as-load", str(port), str(streams), str(requests)]
    done = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=600)
    tokens, reads = done.stdout.split()
    return int(tokens), int(reads)


def measure(command: list[str], port: int, args: argparse.Namespace) -> Measurement:
    """Start a proxy, warm it with one request a stream, measure, stop it."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        await_port(port, process)
        run_load(port, args.streams, 1)
        before, began = cpu_of(process.pid), time.monotonic()
        tokens, reads = run_load(port, args.streams, args.requests)
        wall_s = time.monotonic() - began
        after = cpu_of(process.pid)
        spent = Cpu(after.user_s - before.user_s, after.system_s - before.system_s)
        result = Measurement(tokens, reads, spent, wall_s)
    finally:
        process.terminate()
        process.wait(timeout=10)
    expected = args.streams * args.requests * args.tokens
    if tokens != expected:
        raise SystemExit(f"{tokens} tokens came through {command[0]}, {expected} were sent")
    return result


def start_engine(args: argparse.Namespace) -> tuple[subprocess.Popen[bytes], int]:
    """Start the scripted engine; give back its process and port."""
    argv = [sys.executable, "-m", "tests.perf.scripted_engine", "--tokens", str(args.tokens)]
    argv += ["--rate", str(args.rate), "--pace", args.pace]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def print_table(results: dict[str, list[Measurement]], args: argparse.Namespace) -> None:
    """Medians over the rounds, and the ratio to HAProxy's."""
    print(
        f"\n{args.streams} streams x {args.tokens} tokens x {args.requests} requests, {args.rate:g} tokens/s,"
        f" pace {args.pace}, {args.rounds} rounds, {os.cpu_count()} CPUs, Python {sys.version.split()[0]}"
    )
    print(
        f"{'proxy':<16}{'us CPU/token':>14}{'min':>8}{'max':>8}"
        f"{'user':>8}{'kernel':>8}{'reads':>8}{'ratio':>8}"
    )
    medians = {name: statistics.median(m.us_per_token for m in runs) for name, runs in results.items()}
    for name, runs in results.items():
        each = [m.us_per_token for m in runs]
        user = statistics.median(m.cpu.user_s / m.tokens * 1e6 for m in runs)
        kernel = statistics.median(m.cpu.system_s / m.tokens * 1e6 for m in runs)
        reads = statistics.median(m.reads / m.tokens for m in runs)
        ratio = f"{medians[name] / medians['haproxy']:.2f}" if "haproxy" in medians else "-"
        print(
            f"{name:<16}{medians[name]:>14.2f}{min(each):>8.2f}{max(each):>8.2f}{user:>8.2f}{kernel:>8.2f}"
            f"{reads:>8.2f}{ratio:>8}"
        )


def compare(args: argparse.Namespace) -> None:
    """Measure every proxy in every round and print the table."""
    chosen = dict(PROXIES)
    for given in args.proxy:
        name, _, template = given.partition("=")
        chosen[name] = given_command(template)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}
    results: dict[str, list[Measurement]] = {name: [] for name in chosen}
    engine, engine_port = start_engine(args)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(args.rounds):
                for name, command in chosen.items():
                    port = free_port()
                    results[name].append(measure(command(port, engine_port, Path(folder)), port, args))
    finally:
        engine.terminate()
        engine.wait(timeout=10)
    print_table(results, args)


def main() -> None:
    """Parse arguments and act as the comparison, or as one of its processes."""
    parser = argparse.ArgumentParser(description="CPU per relayed token, against HAProxy")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--requests", type=int, default=4, help="requests per stream and round")
    parser.add_argument("--rate", type=float, default=150.0, help="tokens a second for each stream")
    parser.add_argument("--pace", choices=["steps", "spread"], default="steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--proxy", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--only", default="", help="names of the proxies to measure, comma-separated")
    parser.add_argument("--as-relay", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--as-load", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_relay:
        run(bare_relay(*args.as_relay))
    elif args.as_load:
        run(load(*args.as_load))
    else:
        compare(args)


if __name__ == "__main__":
    main()
