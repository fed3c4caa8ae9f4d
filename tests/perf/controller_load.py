"""What 1,000 workers cost their controller, and how soon frontends hear of a change. Prints a table.

    python -m tests.perf.controller_load [--workers 1000] [--watchers 8] [--agents N] [--seconds 20] [--write]

A real controller in a process of its own, with a plan of so many external engines on a fleet that starts
nothing; a second process registers and renews their leases over real sockets, a few clients for all of them,
in steps spread over a renewal's period. This one has the watchers, as frontends do, and holds one worker's
seat itself: it leaves and comes back, and the time runs from the call until the last watcher has heard.
`--agents`: the fleet is the real one of so many nodes, all of whose agents the second process stands in for.
CPU is that of the controller's threads (/proc/PID/task/*/schedstat).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import msgspec

from dynctl.controller.service import Controller, Parts
from dynctl.deploy.home import Home, RunDir, new_run_id
from dynctl.deploy.plan import Plan
from dynctl.deploy.run import Site, UpRequest, check, plan_run, write_run
from dynctl.deploy.seats import RunContext
from dynctl.deploy.state import ControllerRecord, load_state
from dynctl.discovery.client import Registrar, Watcher
from dynctl.errors import DynctlError, LaunchError
from dynctl.http import runtime
from dynctl.launchers.agents import AgentFleet
from dynctl.launchers.base import Launch, ProcessHandle
from dynctl.launchers.fleet import Ended, Fleet, NodeNews, Seated
from dynctl.launchers.local import LocalLauncher
from dynctl.protocol.agent import ClearReply, LogReply, LookReply, Proc, StartCall
from dynctl.protocol.day2 import ExecReply, NodeRoom
from dynctl.protocol.deployment import DeploymentView
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.registry import Member
from dynctl.recipe.lock import lock_text
from dynctl.topology.ports import first_port_of
from dynctl.transport.control import ControlClient, ControlServer, read_body
from dynctl.transport.keys import Keys
from tests.deployment import ROOT
from tests.perf.serving import cpu_s, write

CLIENTS = 8
"""Control clients that all workers share."""
SPREAD_S = 5.0 / 3
"""A renewal's period at the registry's TTL: the workers begin one after another within it."""
READY_S = 180.0
SETTLE_S = 5.0
CHANGES = 20
HEARD_S = 10.0
BEYOND = 10_000_000
"""Pids from here on are nobody's."""


class IdleFleet:
    """Says of everything that it was started, and that it lives."""

    def __init__(self) -> None:
        self._started = 0

    async def start(self, launch: Launch) -> ProcessHandle:
        """As `Fleet`."""
        self._started += 1
        pid = BEYOND + self._started
        return ProcessHandle(pid, 1, pid)

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """As `Fleet`."""
        return []

    def news(self) -> list[NodeNews]:
        """As `Fleet`."""
        return []

    def doubt(self, node: str, address: str, port: int) -> None:
        """As `Fleet`."""

    async def signal(self, seated: Seated, signum: int) -> bool:
        """As `Fleet`."""
        return True

    async def clear(self, node: str, seat: str, incarnation: int, within_s: float) -> list[int]:
        """As `Fleet`."""
        return []

    async def lives(self, seated: Seated) -> bool:
        """As `Fleet`."""
        return True

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """As `Fleet`."""
        raise LaunchError("nothing runs here")

    async def room(self) -> dict[str, NodeRoom]:
        """As `Fleet`."""
        return {}

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """As `Fleet`."""

    async def dismiss(self) -> None:
        """As `Fleet`."""

    async def close(self) -> None:
        """As `Fleet`."""


def planned(folder: Path, workers: int) -> RunDir:
    """A run of so many external engines, of which nothing has been started."""
    recipe = {
        "schema": "dynctl/v1",
        "name": "load",
        "model": {"path": "builtin:tiny", "served_name": "tiny"},
        "backend": "external",
        "roles": {
            "aggregated": {
                "replicas": workers,
                "urls": [f"http://10.1.{n // 250}.{n % 250}:8000" for n in range(workers)],
            }
        },
        "frontend": {"host": "127.0.0.1", "port": 0},
    }
    file = folder / "load.yaml"
    file.write_text(json.dumps(recipe))
    checked = check(UpRequest(file))
    home = Home(folder / "home")
    home.prepare()
    site = Site(home, LocalLauncher(), os.environ, sys.executable, "0")
    run_id = new_run_id("load", time.gmtime())
    context = RunContext(run_id, str(home.runs / run_id), sys.executable, first_port_of(run_id))
    plan = plan_run(checked, site, context)
    return write_run(plan, lock_text(checked.loaded, "0"), checked.inventory, home)


def instance(seat: str, plan: Plan) -> Instance:
    """What the process in this seat registers."""
    process = plan.process(seat)
    card = ModelCard(name="tiny", path="/models/tiny", max_model_len=4096, block_size=16)
    ports = list(process.ports.values())
    return Instance(
        id=seat,
        incarnation=1,
        role="frontend" if process.kind == "frontend" else "aggregated",
        index=process.index,
        node=process.node,
        pid=BEYOND,
        started_at=time.time(),
        url=f"http://10.1.{process.index // 250}.{process.index % 250}:8000",
        backend="external",
        model=card,
        events=f"tcp://127.0.0.1:{ports[0]}",
        control=f"tcp://127.0.0.1:{ports[-1]}",
    )


def seats_of(plan: Plan) -> list[str]:
    """All workers' seats; the last one is the watchers' process's own."""
    return [process.id for process in plan.processes if process.kind == "worker"]


async def control(run: RunDir, agents: int) -> None:
    """The controller, until it is ended."""
    state = load_state(run.state)
    assert state is not None
    state.controller = ControllerRecord(pid=os.getpid(), start_ticks=1, incarnation=1)
    plan = Plan.from_json(run.plan.read_bytes())
    keys = Keys.load(run.keys)
    fleet: Fleet = IdleFleet()
    if agents:
        names = {process.id: f"n{number % agents}" for number, process in enumerate(plan.processes)}
        plan = replace(plan, processes=tuple(replace(p, node=names[p.id]) for p in plan.processes))
        for seat in state.seats:
            seat.node = names[seat.id]
        fleet = AgentFleet(keys, dict.fromkeys(names.values(), agents_at(plan)), "n0", run.logs)
    await Controller(Parts(run, plan, keys, fleet), state).run()


def agents_at(plan: Plan) -> str:
    """Where all agents answer: the frontend's port, which nobody uses here."""
    return f"tcp://127.0.0.1:{plan.process('frontend-0').ports['http']}"


async def agent(op: str, body: msgspec.Raw) -> msgspec.Struct | None:
    """What an agent answers when all is well."""
    if op == "agent.start":
        call = read_body(body, StartCall)
        return Proc(seat=call.seat, incarnation=call.incarnation, pid=BEYOND, start_ticks=1, pgid=BEYOND)
    return {"agent.look": LookReply(ended=[]), "agent.logs": LogReply(parts=[])}.get(op, ClearReply(left=[]))


async def work(run: RunDir, agents: int) -> None:
    """All workers but one, and the frontend, until this process is ended."""
    plan, keys = Plan.from_json(run.plan.read_bytes()), Keys.load(run.keys)
    seats = [*seats_of(plan)[:-1], "frontend-0"]
    if agents:
        ControlServer(keys, agents_at(plan), agent).start()
    clients = [ControlClient(keys, plan.registry) for _ in range(CLIENTS)]
    registrars = []
    begun = time.monotonic()
    for number, seat in enumerate(seats):
        made = Registrar(clients[number % CLIENTS], instance(seat, plan), on_superseded=lambda: os._exit(1))
        await asyncio.sleep(begun + SPREAD_S * number / len(seats) - time.monotonic())
        made.start()
        registrars.append(made)
    await asyncio.Event().wait()


class Frontends:
    """Watchers, and one worker that leaves and comes back."""

    def __init__(self, run: RunDir, watchers: int) -> None:
        self._plan, self._keys = Plan.from_json(run.plan.read_bytes()), Keys.load(run.keys)
        self._seat = seats_of(self._plan)[-1]
        self._clients = [ControlClient(self._keys, self._plan.registry) for _ in range(watchers + 1)]
        self._have: list[bool] = [False] * watchers
        self._heard_at: list[float] = [0.0] * watchers
        self._news = asyncio.Event()
        self._watchers = [
            Watcher(self._keys, client, self._plan.membership, on_change=self._listener(number))
            for number, client in enumerate(self._clients[1:])
        ]

    def _listener(self, number: int) -> Callable[[list[Member], list[str]], None]:
        def heard(upserts: list[Member], removed: list[str]) -> None:
            before = self._have[number]
            if self._seat in removed:
                self._have[number] = False
            if any(member.instance.id == self._seat for member in upserts):
                self._have[number] = True
            if self._have[number] != before:
                self._heard_at[number] = time.monotonic()
                self._news.set()

        return heard

    async def ready(self, process: subprocess.Popen[bytes]) -> Registrar:
        """Until the controller says that all of it is ready."""
        for watcher in self._watchers:
            watcher.start()
        registrar = self._comes()
        ends = time.monotonic() + READY_S
        while (view := await self._status()) is None or view.phase != "ready":
            if time.monotonic() > ends or process.poll() is not None:
                raise SystemExit(f"not ready: {view.reason if view else 'no answer'}")
            await asyncio.sleep(0.2)
        count = len(seats_of(self._plan)) + 1
        for watcher in self._watchers:
            while len(watcher.members) < count:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0.05)
        return registrar

    async def _status(self) -> DeploymentView | None:
        try:
            return await self._clients[0].call("controller.status", None, DeploymentView, 5.0)
        except DynctlError:
            return None

    def _comes(self) -> Registrar:
        made = Registrar(
            self._clients[0], instance(self._seat, self._plan), on_superseded=lambda: os._exit(1)
        )
        made.start()
        return made

    async def changes(self, registrar: Registrar) -> list[float]:
        """Milliseconds from a worker's call to the last watcher, for each change."""
        rng = Random(3)
        times = []
        for number in range(CHANGES):
            await asyncio.sleep(0.3 + 0.4 * rng.random())
            leaves = number % 2 == 0
            begun = time.monotonic()
            told: Awaitable[None] | None = None
            if leaves:
                told = asyncio.ensure_future(registrar.leave("measured"))
            else:
                registrar = self._comes()
            async with asyncio.timeout(HEARD_S):
                while any(have == leaves for have in self._have):
                    self._news.clear()
                    await self._news.wait()
            times.append(1000 * (max(self._heard_at) - begun))
            if told is not None:
                await told
        return times

    async def close(self) -> None:
        """Let go of all."""
        for watcher in self._watchers:
            await watcher.close()
        for client in self._clients:
            client.close()


@contextmanager
def part(name: str, run: RunDir, agents: int) -> Iterator[subprocess.Popen[bytes]]:
    """A part of this in a process of its own."""
    argv = [sys.executable, "-m", "tests.perf.controller_load", "--part", name, "--run", str(run.path)]
    argv += ["--agents", str(agents)]
    with (run.logs / f"{name}.log").open("wb") as said:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=said, stderr=said)
        try:
            yield process
        finally:
            process.kill()
            process.wait(timeout=15)


async def measure(run: RunDir, watchers: int, agents: int, seconds: float) -> list[tuple[str, str, str]]:
    """The rows of the table."""
    with part("controller", run, agents) as controller:
        frontends = Frontends(run, watchers)
        begun = time.monotonic()
        with part("workers", run, agents):
            registrar = await frontends.ready(controller)
            to_ready, starting = time.monotonic() - begun, cpu_s([controller.pid])
            await asyncio.sleep(SETTLE_S)
            before = cpu_s([controller.pid]), main_s(controller.pid)
            await asyncio.sleep(seconds)
            used = cpu_s([controller.pid]) - before[0], main_s(controller.pid) - before[1]
            times = await frontends.changes(registrar)
            await registrar.close()
            await frontends.close()
    share = [100 * one / seconds for one in used]
    return [
        ("all registered and ready, from nothing", f"{to_ready:.1f} s, {starting:.1f} s of CPU", ""),
        ("controller at rest", f"{share[0]:.1f} % of a core, {share[1]:.1f} % its own thread", "< 30 %"),
        ("a change at all watchers, p50", f"{statistics.median(times):.0f} ms", "≤ 200 ms"),
        ("a change at all watchers, max", f"{max(times):.0f} ms", "≤ 200 ms"),
    ]


def main_s(pid: int) -> float:
    """CPU seconds of a process's first thread: the event loop's, without those that encrypt and send."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    """Measure and print; or be a part of it."""
    parser = argparse.ArgumentParser(description="what many workers cost their controller")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--watchers", type=int, default=8)
    parser.add_argument("--agents", type=int, default=0, help="nodes of a real fleet; 0: none")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--part", choices=("controller", "workers"), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        runtime.run({"controller": control, "workers": work}[args.part](RunDir(args.run), args.agents))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run = planned(folder, args.workers)
        rows = runtime.run(measure(run, args.watchers, args.agents, args.seconds))
    title = f"A controller of {args.workers:,} workers, {args.watchers} frontends watching"
    title += f", on {args.agents} nodes with agents" if args.agents else ""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    lines = ["| | measured | wanted |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    conditions = f"{when} UTC, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f} at the end"
    section = "\n".join([f"#### {title}", "", *lines, "", f"{conditions}."])
    print(section)
    if args.write:
        write("controller-agents" if args.agents else "controller", section)


if __name__ == "__main__":
    main()
