"""The processes of a run inside a Slurm job: each a step of its own, pinned to its node.

`srun` stays here, on the controller's node, as long as its step runs. Its end is a hint: what is left of a
step is what Slurm's list of steps says. A step is found by its name, the seat and incarnation that it was
started as: that stays when its sidecar becomes another seat's, and whose it is now the controller tells.
"""

from __future__ import annotations

import asyncio
import logging
import signal as signals
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from dynctl import procfs
from dynctl.command import Command
from dynctl.errors import LaunchError, SlurmError
from dynctl.launchers.base import Launch, Owned, ProcessHandle, RunRef
from dynctl.launchers.fleet import Ended, LocalFleet, NodeNews, Seated
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.reach import reaches
from dynctl.launchers.slurm_client import SlurmClient, StepRow
from dynctl.launchers.slurm_step import JobSite, step_argv, step_name
from dynctl.protocol.day2 import ExecReply, NodeRoom

logger = logging.getLogger(__name__)

ENV_STEP, ENV_GROUP, ENV_JOB = "DYNCTL_STEP", "DYNCTL_STEP_GROUP", "DYNCTL_STEP_JOB"
"""Set in every step: engines are to do without Slurm's variables, and GPUs count from the step's own."""
GENTLE = "URG"
"""What asks a process of ours to end. A signal to a step reaches all processes in it, so it must be one that
engines ignore: they are ended by their sidecars, when their requests are done.
"""
_SIGNALLED_WITHIN_S = 5.0
_LOOK_AGAIN_S = 0.05
KNOCK_S = 1.5
KNOCK_AGAIN_S = 1.0
GIVEN_S = 10.0
"""How old Slurm's word on a node that answers at once may be: renewals that are late must not flood it."""
JUDGED_S = 5.0
"""For Slurm to say whether a node where something has ended is still in a job of ours."""
_UNREACHED = -1
_SIGNALLED = 128


class SlurmFleet:
    """Steps of the job this process runs in. `stray`: hosts of the run that are in no job of it now."""

    def __init__(self, client: SlurmClient, site: JobSite, run: RunRef, stray: Collection[str] = ()) -> None:
        self._client = client
        self._site = site
        self._run = run
        self._launcher = LocalLauncher()
        self._here = LocalFleet(self._launcher, run)
        self._news: list[NodeNews] = []
        self._judged: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._ends: list[Ended] = []
        self._knocking: dict[str, asyncio.Task[None]] = {}
        self._given_back = dict.fromkeys(stray, "it is in no job of the deployment any more")
        self._asking: asyncio.Task[list[str]] | None = None
        self._asked_at = 0.0
        self._now: dict[str, str] = {}
        self.returned: set[str] = set()
        """Lost nodes that answer again, but are in no job of ours any more."""

    async def start(self, launch: Launch) -> ProcessHandle:
        """As `Fleet`; the handle is that of `srun`, on the controller's node."""
        why = self._given_back.get(launch.node)
        if why is not None:  # it was placed there at the very moment
            self._news.append(NodeNews(launch.node, False, why))
            raise LaunchError(f"{launch.node} has been given back: {why}", where=launch.process_id)
        return await self._here.start(self._step(launch))

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """As `Fleet`: a step beside the seat's."""
        return await self._here.exec(self._step(launch), timeout_s)

    def _step(self, launch: Launch) -> Launch:
        """The start of its `srun` here."""
        argv = step_argv(self._site, launch, self._run)
        job = self._site.others.get(launch.node)
        group = None if job is not None else self._site.groups.get(launch.node)
        marks = {ENV_STEP: "1"} | ({} if group is None else {ENV_GROUP: str(group)})
        marks |= {} if job is None else {ENV_JOB: job}
        command = Command(argv, {**launch.command.env, **marks}, str(self._run.run_dir), launch.command.files)
        return replace(launch, command=command, withheld=launch.withheld | self._site.withheld(launch.node))

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """As `Fleet`: those whose `srun` has ended; on a node of a follow-up job only when it is known
        whether the job lives: if not, the node is told of as lost before.
        """
        self._now = {
            step_name(*one.started): step_name(one.seat, one.incarnation) for one in seats if one.started
        }
        told, self._ends = self._ends, []
        known = {*self._judged, *((one.seat, one.incarnation) for one in told)}
        nodes = {(one.seat, one.incarnation): one.node for one in seats}
        for one in self._here.ended([s for s in seats if (s.seat, s.incarnation) not in known]):
            end, key = replace(one, code=exit_code(one.code)), (one.seat, one.incarnation)
            if nodes[key] in self._site.others:
                judging = self._judge(end, nodes[key])
                name = f"end of {one.seat}"
                self._judged[key] = asyncio.get_running_loop().create_task(judging, name=name)
            else:
                told.append(end)
        return told

    async def _judge(self, end: Ended, node: str) -> None:
        """Tell of an end, and first that the job which gave the node has ended, if so."""
        given = True
        try:
            async with asyncio.timeout(JUDGED_S):
                given = await self._still_given(node, 0.0)
        except TimeoutError:
            logger.info("end.unjudged seat=%s node=%s: Slurm does not answer", end.seat, node)
        job = self._site.others.get(node)
        if not given and job is not None:
            self._news.append(NodeNews(node, False, f"job {job}, which gave it, has ended"))
        self._ends.append(end)
        del self._judged[end.seat, end.incarnation]

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
            given = await self._still_given(node, 0.0 if lost else GIVEN_S)
            if lost and given:
                self._news.append(NodeNews(node, True))
            elif not given:
                self.returned.add(node)
                self._news.append(NodeNews(node, False, "it answers, but Slurm has taken it out of the job"))
        finally:
            del self._knocking[node]

    async def _still_given(self, node: str, age_s: float) -> bool:
        """Whether a node is in a job of ours, as soon as Slurm says; an answer may be so old."""
        while True:
            try:
                return node in await self._given(age_s)
            except SlurmError as error:
                logger.info("node.unknown node=%s error=%s", node, error)
            await asyncio.sleep(KNOCK_AGAIN_S)

    async def _given(self, age_s: float) -> list[str]:
        """The nodes that are in jobs of ours; whoever asks while it is being asked gets the same answer."""
        old = time.monotonic() - self._asked_at > age_s
        if self._asking is None or (self._asking.done() and (old or self._asking.exception() is not None)):
            self._asked_at = time.monotonic()
            asking = asyncio.to_thread(self._client.nodes_of, self._site.jobs)
            self._asking = asyncio.get_running_loop().create_task(asking, name="nodes given")
        return await asyncio.shield(self._asking)

    def join(self, nodes: Collection[str], job_id: str, lost: Collection[str]) -> None:
        """Nodes of a follow-up job are ours from now on; those that were `lost` are back by that."""
        self._site = replace(self._site, others={**self._site.others, **dict.fromkeys(nodes, job_id)})
        self._news += [NodeNews(node, True) for node in nodes if node in lost]
        self.returned.difference_update(nodes)
        for node in nodes:
            self._given_back.pop(node, None)
        self._asking = None  # what Slurm has said of before is not true of these

    def part(self, job_id: str, lost: Collection[str], busy: Collection[str], why: str) -> None:
        """A follow-up job has ended: its `busy` nodes are lost, those that are not `lost` already. Nothing is
        to be started on any of its nodes.
        """
        left = [node for node, owner in self._site.others.items() if owner == job_id]
        self._site = replace(
            self._site, others={node: job for node, job in self._site.others.items() if job != job_id}
        )
        self._given_back.update(dict.fromkeys(left, why))
        self._news += [NodeNews(node, False, why) for node in left if node in busy and node not in lost]

    async def signal(self, seated: Seated, signum: int) -> bool:
        """As `Fleet`. SIGTERM is sent as the signal that only our own processes act on."""
        number = signals.Signals(signum)
        name = GENTLE if number is signals.SIGTERM else number.name.removeprefix("SIG")
        ends = time.monotonic() + _SIGNALLED_WITHIN_S
        while procfs.alive(seated.handle.pid, seated.handle.start_ticks):
            found = [step for step in await self._steps() if step.name == _step_of(seated)]
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
        own = {step_name(seat, number) for number in range(incarnation + 1)}
        mine = own | {f"{seat}.engine"}
        killed: set[str] = set()
        while True:
            try:
                steps = [step for step in await self._steps() if self._now.get(step.name, step.name) in mine]
                for step in [step for step in steps if step.id not in killed]:
                    await asyncio.to_thread(self._client.signal, step.id, "KILL")
                    killed.add(step.id)
            except SlurmError as error:
                logger.warning("step.unknown seat=%s error=%s", seat, error)
                return [_UNREACHED]
            here = self._left_here(own)
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
            return any(step.name == _step_of(seated) for step in await self._steps())
        except SlurmError as error:
            logger.warning("step.unknown seat=%s error=%s", seated.seat, error)
            return True

    async def room(self) -> dict[str, NodeRoom]:
        """As `Fleet`: none is asked; those that were given back are not to be had."""
        return {node: NodeRoom(lost=why) for node, why in self._given_back.items()}

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """As `Fleet`: Slurm has given them."""

    async def dismiss(self) -> None:
        """As `Fleet`: steps have ended, and the job ends with the controller."""

    async def close(self) -> None:
        """As `Fleet`. The steps end with the job."""
        tasks: list[asyncio.Task[Any]] = [*self._knocking.values(), *self._judged.values()]
        tasks += [self._asking] if self._asking is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _steps(self) -> list[StepRow]:
        return await asyncio.to_thread(self._client.steps, self._site.jobs)

    def _left_here(self, own: Collection[str]) -> list[Owned]:
        """`srun` of a seat, and what of it is on this very node."""
        names = [(step_name(o.process_id, o.incarnation), o) for o in self._launcher.owned(self._run.run_id)]
        return [one for name, one in names if self._now.get(name, name) in own]


def _step_of(seated: Seated) -> str:
    return step_name(*(seated.started or (seated.seat, seated.incarnation)))


def exit_code(code: int | None) -> int | None:
    """What `srun` ended with as a process's own: 128 and more is a signal."""
    return _SIGNALLED - code if code is not None and code > _SIGNALLED else code
