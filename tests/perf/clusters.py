"""How long people wait on clusters, and what the loss of a node costs. Needs root and the tests' cluster.

    python -m tests.perf.clusters [--only ssh,many,slurm,node,slurm-node] [--rounds 3] [--write]

Parts, on real sshd hosts and a real Slurm that all share one machine's CPUs (`tests/cluster`):

    ssh    4 hosts, a simulated engine on each and a frontend: `up -d`, `ps`, `down`, what is left
    many   the same with four engines on each host
    slurm  4 nodes: job start to ready, submit to the job's first line beside a bare sbatch, `ps`, `down`
    node   one of four hosts loses its power under load, a fifth is spare: until each of the steps
    slurm-node  the same in a job of three nodes and a spare one

Medians of the rounds; where there are control groups also the CPU time of all that was started, here and on
all hosts. Times of steps are those of the run's events, which have the same clock. `--write` puts the tables
into docs/performance.md, part by part.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.cluster import environment
from tests.cluster.cluster import Cluster, running, why_not
from tests.cluster.commands import eventually
from tests.cluster.hosts import USER
from tests.cluster.login import Login, served
from tests.cluster.ssh_deployment import Laptop, deployed
from tests.perf.cpu_group import CpuGroup
from tests.perf.node_loss import NODE_ROWS, Measured, events_of, first, lose
from tests.perf.serving import write

POLL_S = 0.01
READY_S = 120.0
CPU = CpuGroup()


@dataclass(frozen=True)
class Part:
    """`rows`: what is measured, its unit, and what is wanted."""

    title: str
    run: Callable[[Cluster, Measured], None]
    rows: Mapping[str, tuple[str, str]]


def token() -> str:
    """A name that nothing else has."""
    return f"p-{secrets.token_hex(4)}"


@contextmanager
def user_home(cluster: Cluster, name: str) -> Iterator[Path]:
    """A new DYNCTL_HOME in the home that the hosts share."""
    top = cluster.user_home / name
    top.mkdir()
    shutil.chown(top, USER, USER)
    try:
        yield top / "dynctl"
    finally:
        shutil.rmtree(top, ignore_errors=True)


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


@contextmanager
def cpu_of(what: str, into: Measured, calls: int = 1) -> Iterator[None]:
    """CPU seconds of everything the block has started here and on all hosts, for each of its calls."""
    before = CPU.seconds()
    yield
    after = CPU.seconds()
    if before is not None and after is not None:
        into[f"{what}, CPU"].append((after - before) / calls)


def last(events: Sequence[Mapping[str, Any]], name: str) -> float:
    """When the last such event was."""
    return max(float(event["ts"]) for event in events if event["event"] == name)


def left(cluster: Cluster) -> int:
    """Processes of the user on any host or on the machine."""
    return len([one for one in cluster.processes() if "dynctl" in one.args])


def ssh(cluster: Cluster, into: Measured, engines: int = 4) -> None:
    """One round of a deployment on four hosts."""
    name = token()
    with user_home(cluster, name) as home:
        laptop = Laptop(cluster, home, name, sets=[f"roles.aggregated.replicas={engines}"])
        begun = time.time()
        with ExitStack() as stack:
            with cpu_of("up -d to ready", into):
                stack.enter_context(deployed(laptop))
            into["up -d to ready"].append(time.time() - begun)
            told = events_of(laptop.there / "runs")
            into["of it: the controller runs"].append(first(told, "controller.started") - begun)
            into["of it: its processes are started"].append(last(told, "process.started") - begun)
            into["of it: all are ready"].append(first(told, "deployment.ready") - begun)
            with cpu_of("ps", into, calls=3):
                into["ps"].append(statistics.median(seconds(laptop.ps) for _ in range(3)))
            with cpu_of("down", into):
                into["down"].append(seconds(lambda: laptop.dynctl("down", name)))
            into["processes left"].append(left(cluster))


def many(cluster: Cluster, into: Measured) -> None:
    """As `ssh`, four engines on each host."""
    ssh(cluster, into, engines=16)


class FirstLine:
    """When a file that a pattern names first had something in it."""

    def __init__(self, folder: Path, pattern: str) -> None:
        self._folder, self._pattern = folder, pattern
        self.at = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> FirstLine:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(POLL_S):
            with suppress(OSError):  # A folder that has just got another name.
                if any(file.stat().st_size for file in self._folder.glob(self._pattern)):
                    self.at = time.time()
                    return


def bare(cluster: Cluster, home: Path) -> float:
    """From `sbatch` to the first line of a job that only says one."""
    where = home.parent / token()
    with FirstLine(home.parent, where.name) as line:
        begun = time.time()
        job = cluster.sbatch("date", "-N4", f"--output={where}", f"--chdir={home.parent}")
        eventually(lambda: line.at > 0, "the bare job's line", 60.0)
    cluster.await_job(job)
    return line.at - begun


def slurm(cluster: Cluster, into: Measured) -> None:
    """One round of a deployment as a job of four nodes."""
    name = token()
    with user_home(cluster, name) as home:
        into["submit to the first line, bare sbatch"].append(bare(cluster, home))
        sets = (f"name={name}", "frontend.port=0", "slurm.nodes=4", "roles.aggregated.replicas=4")
        words = [word for one in sets for word in ("--set", one)]

        def verb(*args: str) -> str:
            return cluster.dynctl(*args, home=home, timeout=READY_S).stdout

        with FirstLine(home, "runs/*/logs/controller.log") as line:
            begun = time.time()
            verb("up", "quickstart", "--target", "slurm", "-d", *words)
            whole = time.time() - begun
        try:
            told = events_of(home / "runs")
            ready, engines = first(told, "deployment.ready"), engines_own(home / "runs")
            into["submit to the first line, dynctl up"].append(line.at - begun)
            into["job start to ready"].append(ready - line.at)
            into["of it: the engines' own"].append(engines)
            into["of it: over the engines' own"].append(ready - line.at - engines)
            into["up -d to ready, whole"].append(whole)
            into["ps"].append(
                statistics.median(seconds(lambda: verb("ps", name, "--json")) for _ in range(3))
            )
        finally:
            into["down"].append(seconds(lambda: verb("down", name)))
        into["processes left"].append(left(cluster))


def engines_own(runs: Path) -> float:
    """The longest any engine took from its start until its sidecar found it ready."""

    def at(log: Path, event: str) -> float:
        line = next(line for line in log.read_text().splitlines() if f" {event} " in line)
        return datetime.fromisoformat(line.split()[0]).timestamp()

    logs = [log for log in runs.glob("*/logs/aggregated-*.log") if ".engine" not in log.name]
    return max(at(log, "worker.ready") - at(log, "engine.started") for log in logs)


def node(cluster: Cluster, into: Measured) -> None:
    """One round: a host without power under load, its worker ready on the spare one."""
    name = token()
    with user_home(cluster, name) as home:
        laptop = Laptop(cluster, home, name, hosts=("n1", "n2", "n3", "n4", "head"))
        with deployed(laptop) as told:
            lose(cluster, told["url"], laptop.ps(), laptop.there / "runs", into)


def slurm_node(cluster: Cluster, into: Measured) -> None:
    """The same in a job of three nodes and a spare one."""
    name = token()
    with user_home(cluster, name) as home:
        login = Login(cluster, home, name)
        sets = ("slurm.nodes=3", "slurm.spares=1", "roles.aggregated.replicas=3", "frontend.host=0.0.0.0")
        with served(login, *sets) as url:
            lose(cluster, url, login.ps(), home / "runs", into)


_SSH_ROWS = {
    "up -d to ready": ("s", "≤ 6 s"),
    "of it: the controller runs": ("s", ""),
    "of it: its processes are started": ("s", ""),
    "of it: all are ready": ("s", ""),
    "up -d to ready, CPU": ("s", ""),
    "ps": ("s", "≤ 0.5 s"),
    "ps, CPU": ("s", ""),
    "down": ("s", "≤ 4 s"),
    "down, CPU": ("s", ""),
    "processes left": ("", "0"),
}
PARTS = {
    "ssh": Part(
        "SSH: 4 hosts with a simulated engine each, and a frontend",
        ssh,
        _SSH_ROWS,
    ),
    "many": Part(
        "SSH: 4 hosts with four simulated engines each, and a frontend",
        many,
        _SSH_ROWS,
    ),
    "slurm": Part(
        "Slurm: a job of 4 nodes with a simulated engine each, and a frontend",
        slurm,
        {
            "submit to the first line, bare sbatch": ("s", ""),
            "submit to the first line, dynctl up": ("s", "≤ the bare one + 1 s"),
            "job start to ready": ("s", ""),
            "of it: the engines' own": ("s", ""),
            "of it: over the engines' own": ("s", "≤ 3 s"),
            "up -d to ready, whole": ("s", ""),
            "ps": ("s", "≤ 0.5 s"),
            "down": ("s", "≤ 4 s"),
            "processes left": ("", "0"),
        },
    ),
    "node": Part(
        "A node without power under load: 4 hosts by SSH and a spare one, 8 clients that stream",
        node,
        NODE_ROWS,
    ),
    "slurm-node": Part(
        "A node without power under load: a job of 3 nodes and a spare one, 8 clients that stream",
        slurm_node,
        NODE_ROWS,
    ),
}


def table(part: Part, measured: Measured) -> str:
    """Medians over the rounds, as Markdown."""
    lines = ["| | median | min, max | wanted |", "|---|---|---|---|"]
    for what, (unit, wanted) in part.rows.items():
        values = measured[what]
        if not values:
            continue  # CPU where there are no control groups
        shown = [f"{value:.2f}" if unit else f"{value:g}" for value in (min(values), max(values))]
        middle = statistics.median(values)
        median = f"{middle:.2f} {unit}" if unit else f"{middle:g}"
        lines.append(f"| {what} | {median} | {', '.join(shown)} | {wanted} |")
    return "\n".join(lines)


def measure(part: Part, cluster: Cluster, rounds: int) -> str:
    """A part's section."""
    measured: Measured = defaultdict(list)
    before = os.getloadavg()[0]
    for _ in range(rounds):
        part.run(cluster, measured)
        print(".", end="", flush=True, file=sys.stderr)
        if found := cluster.clean():
            sys.stderr.write(f"\nleft over, and ended now: {found}\n")
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    loads = f"{before:.1f} before and {os.getloadavg()[0]:.1f} after"
    conditions = f"{when} UTC, all hosts on one machine of {os.cpu_count()} CPUs, load average {loads}"
    return f"#### {part.title}\n\n{table(part, measured)}\n\n{conditions}; {rounds} rounds."


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description="how long people wait on clusters")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/performance.md")
    args = parser.parse_args()
    if why := why_not():
        raise SystemExit(f"no cluster here: {why}")
    CPU.enter()
    try:
        with running(environment.build()) as cluster:
            for name in args.only.split(","):
                section = measure(PARTS[name], cluster, args.rounds)
                print(f"\n{section}\n", flush=True)
                if args.write:
                    write(f"cluster-{name}", section)
    finally:
        CPU.close()


if __name__ == "__main__":
    main()
