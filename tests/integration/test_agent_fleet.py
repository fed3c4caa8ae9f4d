"""Agents on two nodes (of this machine), and a controller's fleet that has nothing but their endpoints."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from dynctl.command import Command
from dynctl.deploy import receive
from dynctl.deploy.home import Home
from dynctl.errors import DynctlError, LaunchError, PlacementError
from dynctl.launchers import agents
from dynctl.launchers.agents import AgentFleet
from dynctl.launchers.base import Launch, ProcessHandle, RunRef
from dynctl.launchers.fleet import Ended, NodeNews, Seated
from dynctl.launchers.local import LocalLauncher
from dynctl.protocol.agent import StartCall
from dynctl.protocol.exits import LastWords
from dynctl.topology.ports import PortAllocator
from dynctl.transport.control import ControlClient
from dynctl.transport.keys import Keys

RUN_ID = "fleet-of-a-test"
DEADLINE_S = 20.0
T = TypeVar("T")


class Plane:
    """Two nodes with an agent each, and the fleet."""

    def __init__(self, home: Path, ports: list[int], name: str = "one") -> None:
        self.run_id = f"{RUN_ID}-{name}-{os.getpid()}"
        Home(home).prepare()
        self.root = home / "nodes" / self.run_id
        self.root.mkdir(mode=0o700, parents=True)
        self.keys = Keys.generate()
        self.launcher = LocalLauncher()
        self.endpoints = {f"n{i}": f"tcp://127.0.0.1:{port}" for i, port in enumerate(ports, 1)}
        self.started: list[ProcessHandle] = []
        self.agents = {name: self.start_agent(name) for name in self.endpoints}
        self.fleet = AgentFleet(self.keys, self.endpoints, "n1", self.run_dir("n1") / "logs")

    def run_dir(self, node: str) -> Path:
        folder = self.root / node
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def start_agent(self, node: str) -> ProcessHandle:
        folder = self.run_dir(node)
        self.keys.save(folder / "keys.json")
        options = ("--run-dir", str(folder), "--run-id", self.run_id)
        argv = (
            sys.executable,
            "-m",
            "dynctl.agent",
            *options,
            "--node",
            node,
            "--endpoint",
            self.endpoints[node],
        )
        launch = Launch(f"agent-{node}", 1, Command(argv), node)
        self.started.append(self.launcher.start(launch, RunRef(self.run_id, folder)))
        return self.started[-1]

    def join(self, node: str) -> receive.Join:
        """What `up` on the name of a run that lives tells a host."""
        argv = ["-m", "dynctl.agent", "--run-dir", str(self.run_dir(node)), "--run-id", self.run_id]
        argv = [sys.executable, *argv, "--node", node, "--endpoint", self.endpoints[node]]
        spawn = receive.Spawn(
            process_id=f"agent-{node}", incarnation=1, argv=argv, env={}, endpoint=self.endpoints[node]
        )
        keys = {"keys.json": (self.run_dir(node) / "keys.json").read_text()}
        return receive.Join(name="one", run_id=self.run_id, node=node, files=keys, spawn=[spawn])

    def agent_pid(self, node: str) -> int:
        """The agent itself, which its keeper has started; 0 while there is none."""
        keeper, owned = self.agents[node].pid, self.launcher.owned(self.run_id)
        return next((one.handle.pid for one in owned if one.ppid == keeper), 0)

    async def next_agent(self, node: str, before: int) -> int:
        """The pid of the agent after this one."""
        await until(lambda: self.agent_pid(node) not in (0, before))
        return self.agent_pid(node)

    async def kill_agent(self, node: str) -> None:
        """With its keeper, which would start another."""
        self.launcher.kill(
            [one for one in self.launcher.owned(self.run_id) if one.process_id == f"agent-{node}"]
        )
        await until(lambda: self.launcher.poll([self.agents[node]]))

    async def start(
        self, code: str, node: str = "n1", seat: str = "decode-0", incarnation: int = 1
    ) -> Seated:
        launch = Launch(seat, incarnation, Command((sys.executable, "-c", code)), node)
        return Seated(seat, incarnation, node, await self.fleet.start(launch))

    async def end_of(self, *seats: Seated) -> Ended:
        return (await until(lambda: self.fleet.ended(seats)))[0]

    async def close(self) -> None:
        await self.fleet.dismiss()
        await self.fleet.close()
        self.launcher.kill(self.launcher.owned(self.run_id))
        await until(lambda: not self.launcher.owned(self.run_id))
        self.launcher.poll(self.started)
        for handle in self.started:  # one that dies this moment is nobody's any more, but no zombie yet
            self.launcher.release(handle)


async def until(look: Callable[[], T]) -> T:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if found := look():
                return found
            await asyncio.sleep(0.02)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[Plane]:
    ports = PortAllocator((), 21_000 + os.getpid() % 5_000)
    made = Plane(tmp_path, [ports.allocate(["n"]) for _ in range(2)])
    yield made
    await made.close()


@pytest.fixture
async def other(tmp_path: Path, plane: Plane) -> AsyncIterator[Plane]:
    """Another run on the same two nodes."""
    ports = PortAllocator((), 26_500 + os.getpid() % 5_000)
    made = Plane(tmp_path, [ports.allocate(["n"]) for _ in range(2)], "other")
    yield made
    await made.close()


SLEEP = "import time; time.sleep(120)"


async def test_exits_on_any_node_are_told_with_code_and_last_lines(plane: Plane) -> None:
    good = await plane.start("print('fine')", "n1", "decode-0")
    bad = await plane.start("import sys; print('RuntimeError: no memory'); sys.exit(3)", "n2", "decode-1")
    ends: dict[str, Ended] = {}
    while len(ends) < 2:
        for end in await until(lambda: plane.fleet.ended([good, bad])):
            ends[end.seat] = end
    assert ends["decode-0"].code == 0
    assert (ends["decode-1"].code, ends["decode-1"].lines) == (3, ("RuntimeError: no memory",))


async def test_logs_of_another_node_are_read_where_the_controller_is_also_when_it_has_gone(
    plane: Plane,
) -> None:
    logs = plane.run_dir("n1") / "logs"
    seated = await plane.start("import time; print('a line', flush=True); time.sleep(120)", "n2", "decode-5")
    copy = logs / "decode-5.log"
    await until(lambda: copy.exists() and copy.read_text() == "a line\n")
    assert copy.stat().st_mode & 0o777 == 0o600
    await plane.kill_agent("n2")
    plane.agents["n2"] = plane.start_agent("n2")
    with (plane.run_dir("n2") / "logs" / "decode-5.log").open("a") as file:
        file.write("another\nhalf")
    await until(lambda: copy.read_text() == "a line\nanother\n")
    assert await plane.fleet.lives(seated)


async def test_last_words_come_from_the_node_they_were_left_on(plane: Plane) -> None:
    words = LastWords(id="decode-0", incarnation=1, kind="engine", message="out of memory", permanent=True)
    folder = plane.run_dir("n2") / "exits"
    folder.mkdir()
    (folder / "decode-0.json").write_bytes(msgspec.json.encode(words))
    seated = await plane.start("raise SystemExit(1)", "n2")
    assert (await plane.end_of(seated)).words == words


async def test_a_start_asked_for_twice_starts_once(plane: Plane) -> None:
    first, second = await asyncio.gather(plane.start(SLEEP), plane.start(SLEEP))
    assert first == second


async def test_an_older_incarnation_is_ended_before_the_next_one_starts(plane: Plane) -> None:
    old = await plane.start(SLEEP)
    new = await plane.start(SLEEP, incarnation=2)
    assert not await plane.fleet.lives(old)
    assert await plane.fleet.lives(new)


async def test_a_process_outlives_its_agent_and_is_followed_by_the_next(plane: Plane) -> None:
    seated = await plane.start(SLEEP)
    await plane.kill_agent("n1")
    plane.agents["n1"] = plane.start_agent("n1")
    assert await plane.fleet.lives(seated)
    assert await plane.fleet.signal(seated, signal.SIGTERM)
    assert (await plane.end_of(seated)).code is None


async def test_a_node_that_does_not_answer_is_lost_and_comes_back(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    await plane.start("pass", "n1", "decode-1")  # or its agent, not there yet, is told of too
    seated = await plane.start(SLEEP, "n2")
    monkeypatch.setattr(agents, "LOST_S", 0.5)
    os.kill(plane.agent_pid("n2"), signal.SIGSTOP)
    try:
        (lost,) = await until(plane.fleet.news)
        assert (lost.node, lost.reachable) == ("n2", False)
        assert lost.why == "its agent does not answer"
        assert lost.silent_s > 0.0
        assert await plane.fleet.lives(seated), "what cannot be asked for is not started a second time"
        other = await plane.start("print()", "n1", "decode-1")
        assert (await plane.end_of(other)).code == 0
    finally:
        os.kill(plane.agent_pid("n2"), signal.SIGCONT)
    assert await until(plane.fleet.news) == [NodeNews("n2", True)]


async def test_up_again_starts_an_agent_anew_that_hangs_and_leaves_one_that_answers(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receive, "_ANSWER_S", 0.5)
    worker = await plane.start(SLEEP, "n2")
    hung, well = await plane.next_agent("n2", 0), await plane.next_agent("n1", 0)
    os.kill(hung, signal.SIGSTOP)
    for node in ("n1", "n2"):
        await asyncio.to_thread(receive.answer, plane.join(node), Home(plane.root.parents[1]), plane.launcher)
    assert plane.agent_pid("n1") == well
    now = [one for one in plane.launcher.owned(plane.run_id) if one.process_id == "agent-n2"]
    assert now
    assert hung not in {one.handle.pid for one in now}
    assert await plane.fleet.lives(worker), "what it had started was not touched"


async def test_all_of_a_seat_is_cleared(plane: Plane) -> None:
    child = f"import subprocess,sys,time; subprocess.Popen([sys.executable,'-c',{SLEEP!r}]); time.sleep(120)"
    seated = await plane.start(child)
    await until(lambda: sum(o.process_id == "decode-0" for o in plane.launcher.owned(plane.run_id)) == 2)
    assert await plane.fleet.clear("n1", "decode-0", 1, 5.0) == []
    assert not await plane.fleet.lives(seated)
    assert not [o for o in plane.launcher.owned(plane.run_id) if o.process_id == "decode-0"]


async def test_a_program_that_is_not_there_is_an_error_with_its_node(plane: Plane) -> None:
    with pytest.raises(LaunchError, match="no such program") as failure:
        await plane.fleet.start(Launch("decode-0", 1, Command(("/no/such/program",)), "n2"))
    assert failure.value.where == "n2"


async def test_a_stranger_without_the_keys_starts_nothing(plane: Plane) -> None:
    await plane.start("print()")
    stranger = ControlClient(Keys.generate(), plane.endpoints["n1"])
    try:
        call = StartCall(seat="decode-9", incarnation=1, argv=[sys.executable, "-c", SLEEP], env={})
        with pytest.raises(DynctlError):
            await stranger.call("agent.start", call, type(None), 1.0)
    finally:
        stranger.close()
    assert not [o for o in plane.launcher.owned(plane.run_id) if o.process_id == "decode-9"]


async def test_agents_leave_when_the_run_has_ended(plane: Plane) -> None:
    await plane.start("print()")
    await plane.fleet.dismiss()
    handles = list(plane.agents.values())
    codes: dict[int, int | None] = {}
    while len(codes) < 2:
        for one in await until(lambda: plane.launcher.poll(handles)):
            codes.setdefault(one.handle.pid, one.code)
    assert list(codes.values()) == [0, 0]


async def test_two_runs_that_want_the_same_gpus_of_a_node_at_once_do_not_both_get_them(
    plane: Plane, other: Plane
) -> None:
    told = await asyncio.gather(
        plane.fleet.hold("n2", {0, 1}), other.fleet.hold("n2", {1, 2}), return_exceptions=True
    )
    refused = [one for one in told if one is not None]
    assert len(refused) == 1
    assert isinstance(refused[0], PlacementError)
    assert refused[0].where == "n2"
    assert "has GPU 1 already" in refused[0].message
    won, lost = (plane, other) if told[0] is None else (other, plane)
    mine = {0, 1} if won is plane else {1, 2}
    assert set((await lost.fleet.room())["n2"].gpus) == mine
    won.launcher.kill(won.launcher.owned(won.run_id))  # both "nodes" are this host
    await until(lambda: not won.launcher.owned(won.run_id))
    await lost.fleet.hold("n2", {0, 1, 2})


async def test_a_port_in_use_on_another_node_is_told(plane: Plane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        room = await plane.fleet.room()
        assert busy.getsockname()[1] in room["n2"].ports
    await plane.kill_agent("n1")
    room = await plane.fleet.room()
    assert room["n1"].lost
    assert not room["n2"].lost


async def test_an_agent_that_dies_is_back_by_itself_and_what_it_started_is_not_started_again(
    plane: Plane,
) -> None:
    worker = await plane.start(SLEEP, "n2", "decode-0")
    first = await until(lambda: plane.agent_pid("n2"))
    for _ in range(2):
        os.kill(plane.agent_pid("n2"), signal.SIGKILL)
        first = await plane.next_agent("n2", first)
    again = await plane.start(SLEEP, "n2", "decode-0")
    assert again == worker
    await plane.fleet.signal(worker, signal.SIGKILL)
    assert (await plane.end_of(worker)).seat == "decode-0"


async def test_an_agent_goes_on_without_its_keeper(plane: Plane) -> None:
    await until(lambda: plane.agent_pid("n2"))
    os.kill(plane.agents["n2"].pid, signal.SIGKILL)
    await until(lambda: plane.launcher.poll([plane.agents["n2"]]))
    assert await plane.start(SLEEP, "n2")
