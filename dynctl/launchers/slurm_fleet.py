"""The processes of a run inside a Slurm job: each a step of its own, pinned to its node.

`srun` stays here, on the controller's node, as long as its step runs. Its end is a hint: what is left of a
step is what Slurm's list of steps says. A step is found by its name, the seat and incarnation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal as signals
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from dynctl import procfs
from dynctl.command import Command
from dynctl.errors import LaunchError, SlurmError
from dynctl.launchers.base import Launch, Owned, ProcessHandle, RunRef
from dynctl.launchers.fleet import Ended, LocalFleet, NodeNews, Seated
from dynctl.launchers.last_lines import tail, telling_lines
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.reach import reaches
from dynctl.launchers.slurm_client import SlurmClient, StepRow
from dynctl.protocol.day2 import ExecReply, NodeRoom

logger = logging.getLogger(__name__)

ENV_STEP, ENV_GROUP = "DYNCTL_STEP", "DYNCTL_STEP_GROUP"
"""Set in every step: engines are to do without Slurm's variables, and GPUs count from the step's own."""
GENTLE = "URG"
"""What asks a process of ours to end. A signal to a step reaches all processes in it, so it must be one that
engines ignore: they are ended by their sidecars, when their requests are done.
"""
_SIGNALLED_WITHIN_S = 5.0
_LOOK_AGAIN_S = 0.05
KNOCK_S = 1.5
KNOCK_AGAIN_S = 1.0
_UNREACHED = -1
_SIGNALLED = 128
_LINES = 20
_EVERY_STEP = (
    "--mem=0",
    "--cpu-bind=none",
    "--kill-on-bad-exit=0",
    "--wait=0",
    "--input=none",
    "--unbuffered",
    "--quiet",
    "--export=ALL",
)
"""All memory of the job on the node, no CPU apart, the environment as it is, output as it comes."""
_OF_THE_BATCH = (
    "SLURM_MEM_PER_",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPU_BIND",
    "SLURM_MEM_BIND",
    "SLURM_TRES_PER_TASK",
    "SLURM_GPUS",
    "SLURM_EXPORT_ENV",
    "SLURM_DISTRIBUTION",
    "SRUN_",
)
"""Variables of the batch script that `srun` would take for options of the step."""


@dataclass(frozen=True, slots=True)
class JobSite:
    """The job this process runs in.

    `groups`: node → its part of a job of several parts, `part_ids` the ids of all parts, each with steps of
    its own.
    """

    job_id: str
    groups: Mapping[str, int] = field(default_factory=dict)
    part_ids: tuple[str, ...] = ()


def step_name(seat: str, incarnation: int) -> str:
    """By which the step is found again."""
    return f"{seat}.i{incarnation}"


def step_argv(site: JobSite, launch: Launch, run: RunRef) -> tuple[str, ...]:
    """`srun` for one process, beside whatever else runs on the node, with all the job has there."""
    group = site.groups.get(launch.node)
    return (
        "srun",
        *(() if group is None else (f"--het-group={group}",)),
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={launch.node}",
        f"--job-name={step_name(launch.process_id, launch.incarnation)}",
        *_EVERY_STEP,
        f"--chdir={launch.command.cwd or run.run_dir}",
        *launch.command.argv,
    )


T = TypeVar("T")


class SlurmFleet:
    """Steps of the job this process runs in."""

    def __init__(self, client: SlurmClient, site: JobSite, run: RunRef) -> None:
        self._client = client
        self._site = site
        self._run = run
        self._launcher = LocalLauncher()
        self._here = LocalFleet(self._launcher, run)
        self._news: list[NodeNews] = []
        self._knocking: dict[str, asyncio.Task[None]] = {}

    async def start(self, launch: Launch) -> ProcessHandle:
        """As `Fleet`; the handle is that of `srun`, on the controller's node."""
        return await self._here.start(self._step(launch))

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """As `Fleet`: a step beside the seat's."""
        return await self._here.exec(self._step(launch), timeout_s)

    def _step(self, launch: Launch) -> Launch:
        """The start of its `srun` here."""
        argv = step_argv(self._site, launch, self._run)
        group = self._site.groups.get(launch.node)
        marks = {ENV_STEP: "1"} | ({} if group is None else {ENV_GROUP: str(group)})
        command = Command(argv, {**launch.command.env, **marks}, str(self._run.run_dir), launch.command.files)
        batch = frozenset(name for name in os.environ if name.startswith(_OF_THE_BATCH))
        return replace(launch, command=command, withheld=launch.withheld | batch)

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """As `Fleet`: those whose `srun` has ended."""
        return [replace(one, code=exit_code(one.code)) for one in self._here.ended(seats)]

    def news(self) -> list[NodeNews]:
        """As `Fleet`, of nodes that were in doubt: Slurm itself takes minutes to see a node go."""
        news, self._news = self._news, []
        return news

    def doubt(self, node: str, address: str, port: int) -> None:
        """As `Fleet`: knock there until it answers."""
        if node not in self._knocking:
            knocking = self._knock(node, address, port)
            self._knocking[node] = asyncio.get_running_loop().create_task(knocking, name=f"knock {node}")

    async def _knock(self, node: str, address: str, port: int) -> None:
        lost = False
        try:
            while not await reaches(address, port, KNOCK_S):
                if not lost:
                    lost = True
                    self._news.append(NodeNews(node, False, f"{address} does not answer"))
                await asyncio.sleep(KNOCK_AGAIN_S)
            if lost:
                self._news.append(NodeNews(node, True))
        finally:
            del self._knocking[node]

    async def signal(self, seated: Seated, signum: int) -> bool:
        """As `Fleet`. SIGTERM is sent as the signal that only our own processes act on."""
        number = signals.Signals(signum)
        name = GENTLE if number is signals.SIGTERM else number.name.removeprefix("SIG")
        ends = time.monotonic() + _SIGNALLED_WITHIN_S
        while procfs.alive(seated.handle.pid, seated.handle.start_ticks):
            found = [s for s in await self._steps() if s.name == step_name(seated.seat, seated.incarnation)]
            if found:
                await asyncio.to_thread(self._client.signal, found[0].id, name)
                return True
            if time.monotonic() > ends:
                # It still waits for its step: nothing of it runs on the node.
                return self._launcher.signal(seated.handle, signals.SIGKILL)
            await asyncio.sleep(_LOOK_AGAIN_S)
        return False

    async def clear(self, node: str, seat: str, incarnation: int, within_s: float) -> list[int]:
        """As `Fleet`: kills the step, and `srun`, and waits until Slurm lists no such step any more."""
        ends = time.monotonic() + within_s
        mine = {step_name(seat, number) for number in range(1, incarnation + 1)} | {f"{seat}.engine"}
        killed: set[str] = set()
        while True:
            try:
                steps = [step for step in await self._steps() if step.name in mine]
                for step in [step for step in steps if step.id not in killed]:
                    await asyncio.to_thread(self._client.signal, step.id, "KILL")
                    killed.add(step.id)
            except SlurmError as error:
                logger.warning("step.unknown seat=%s error=%s", seat, error)
                return [_UNREACHED]
            here = self._left_here(seat, incarnation)
            if not steps:
                self._launcher.kill(here)
            if not (steps or here):
                return []
            if time.monotonic() > ends:
                return [one.handle.pid for one in here] or [_UNREACHED]
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def lives(self, seated: Seated) -> bool:
        """As `Fleet`: Slurm lists the step."""
        try:
            return any(s.name == step_name(seated.seat, seated.incarnation) for s in await self._steps())
        except SlurmError as error:
            logger.warning("step.unknown seat=%s error=%s", seated.seat, error)
            return True

    async def room(self) -> dict[str, NodeRoom]:
        """As `Fleet`: none is asked."""
        return {}

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """As `Fleet`: Slurm has given them."""

    async def dismiss(self) -> None:
        """As `Fleet`: steps have ended, and the job ends with the controller."""

    async def close(self) -> None:
        """As `Fleet`. The steps end with the job."""
        tasks = list(self._knocking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _steps(self) -> list[StepRow]:
        jobs = self._site.part_ids or (self._site.job_id,)
        return await asyncio.to_thread(self._client.steps, ",".join(jobs))

    def _left_here(self, seat: str, incarnation: int) -> list[Owned]:
        """`srun` of the seat, and what of it is on this very node."""
        owned = self._launcher.owned(self._run.run_id)
        return [one for one in owned if one.process_id == seat and one.incarnation <= incarnation]


def exit_code(code: int | None) -> int | None:
    """What `srun` ended with as a process's own: 128 and more is a signal."""
    return _SIGNALLED - code if code is not None and code > _SIGNALLED else code


def run_on(site: JobSite, nodes: Sequence[str], argv: Sequence[str], log: Path, within_s: float) -> None:
    """Run a command once on each of these nodes, to its end. Raises LaunchError with what it said last."""
    for group in sorted({site.groups.get(node, 0) for node in nodes}):
        chosen = [node for node in nodes if site.groups.get(node, 0) == group]
        step = (
            "srun",
            *((f"--het-group={group}",) if site.groups else ()),
            "--overlap",
            f"--nodes={len(chosen)}",
            f"--ntasks={len(chosen)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(chosen)}",
            *_EVERY_STEP,
            "--label",
            *argv,
        )
        environ = {k: v for k, v in os.environ.items() if not k.startswith(_OF_THE_BATCH)}
        try:
            with log.open("ab") as output:
                done = subprocess.run(
                    step,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environ,
                    timeout=within_s,
                    check=False,
                )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LaunchError(f"{argv[0]} could not be run on {' '.join(chosen)}: {error}") from error
        if done.returncode:
            said = "\n".join(f"  {line}" for line in telling_lines(tail(log, _LINES), _LINES))
            raise LaunchError(f"it failed on one of {' '.join(chosen)}:\n{said}", where=str(log))
