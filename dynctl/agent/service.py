"""One node's hands: starts, watches and ends the processes of one run there, for its controller.

It keeps nothing on disk. One that is started anew finds what lives by the run's id in the environment.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from dynctl.agent.logs import read_logs
from dynctl.command import Command
from dynctl.deploy.gpus import hold, others
from dynctl.deploy.home import Home
from dynctl.deploy.ports import listening
from dynctl.errors import DiscoveryError
from dynctl.launchers.base import Launch, Launcher, ProcessHandle, RunRef, heads
from dynctl.launchers.fleet import LocalFleet, Seated
from dynctl.protocol.agent import (
    ClearCall,
    ClearReply,
    EndedProc,
    Found,
    HoldCall,
    LivesCall,
    LogCall,
    LookCall,
    LookReply,
    NodeExec,
    Proc,
    SignalCall,
    StartCall,
)
from dynctl.protocol.day2 import NodeRoom
from dynctl.transport.control import ControlServer, read_body
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

KEPT_ENDS = 1000
CLEARED_WITHIN_S = 5.0


class Agent:
    """Answers the controller's calls until it is told that the run has ended."""

    def __init__(self, keys: Keys, endpoint: str, launcher: Launcher, run: RunRef, node: str) -> None:
        self._launcher = launcher
        self._run = run
        self._node = node
        self._fleet = LocalFleet(launcher, run)
        self._server = ControlServer(keys, endpoint, self._answer)
        self._ended: dict[tuple[str, int, int], EndedProc] = {}
        self._starting: dict[str, asyncio.Lock] = {}
        self._over = asyncio.Event()

    async def serve(self) -> None:
        """Until the run has ended or this process is told to leave. Raises PortInUse."""
        bound = self._server.start()
        logger.info("agent.listening node=%s endpoint=%s", self._node, bound)
        try:
            await self._over.wait()
        finally:
            await self._server.close()

    def leave(self) -> None:
        """Exit and let everything run on: another agent may take over."""
        self._over.set()

    async def _answer(self, op: str, body: msgspec.Raw) -> msgspec.Struct | None:
        match op:
            case "agent.start":
                return await self._start(read_body(body, StartCall))
            case "agent.look":
                return self._look(read_body(body, LookCall).procs)
            case "agent.signal":
                call = read_body(body, SignalCall)
                return Found(found=await self._fleet.signal(self._seated(call.proc), call.signum))
            case "agent.lives":
                return Found(found=await self._fleet.lives(self._seated(read_body(body, LivesCall).proc)))
            case "agent.clear":
                given = read_body(body, ClearCall)
                left = await self._fleet.clear(self._node, given.seat, given.incarnation, given.within_s)
                return ClearReply(left=left)
            case "agent.exec":
                asked = read_body(body, NodeExec)
                command = Command(tuple(asked.argv), asked.env, asked.cwd or str(self._run.run_dir))
                return await self._fleet.exec(Launch(asked.seat, 0, command, self._node), asked.timeout_s)
            case "agent.logs":
                return read_logs(self._run.run_dir / "logs", read_body(body, LogCall))
            case "agent.room":
                return await asyncio.to_thread(self._room)
            case "agent.hold":
                gpus, folder = read_body(body, HoldCall).gpus, self._run.run_dir
                await asyncio.to_thread(hold, Home.holding(folder), folder, self._run.run_id, gpus)
                return None
            case "agent.leave":
                asyncio.get_running_loop().call_later(0.1, self.leave)
                return None
        hint = "agent.start, look, signal, lives, clear, exec, logs, room, hold or leave"
        raise DiscoveryError(f"unknown op {op!r}", hint=hint)

    async def _start(self, call: StartCall) -> Proc:
        """Start, unless it runs; what is left of earlier incarnations is ended first."""
        async with self._starting.setdefault(call.seat, asyncio.Lock()):
            for one in heads(self._launcher.owned(self._run.run_id)):
                if one.process_id == call.seat and one.incarnation == call.incarnation:
                    return _proc(call.seat, call.incarnation, one.handle)
            await self._fleet.clear(self._node, call.seat, call.incarnation - 1, CLEARED_WITHIN_S)
            command = Command(tuple(call.argv), call.env, call.cwd or None, call.files)
            handle = await self._fleet.start(Launch(call.seat, call.incarnation, command, self._node))
            return _proc(call.seat, call.incarnation, handle)

    def _room(self) -> NodeRoom:
        taken = others(Home.holding(self._run.run_dir), self._run.run_id)
        return NodeRoom(ports=sorted(listening()), gpus=taken)

    def _look(self, procs: list[Proc]) -> LookReply:
        """A child is reaped once, but told of for as long as it is asked for: an answer may be lost."""
        asked = {_key(proc) for proc in procs}
        unknown = [self._seated(proc) for proc in procs if _key(proc) not in self._ended]
        by_seat = {(one.seat, one.incarnation): one for one in unknown}
        for end in self._fleet.ended(unknown):
            seated = by_seat[end.seat, end.incarnation]
            told = EndedProc(
                seat=end.seat,
                incarnation=end.incarnation,
                code=end.code,
                words=end.words,
                lines=list(end.lines),
            )
            self._ended[end.seat, end.incarnation, seated.handle.pid] = told
        while len(self._ended) > KEPT_ENDS:
            del self._ended[next(iter(self._ended))]
        return LookReply(ended=[end for key, end in self._ended.items() if key in asked])

    def _seated(self, proc: Proc) -> Seated:
        handle = ProcessHandle(proc.pid, proc.start_ticks, proc.pgid)
        return Seated(proc.seat, proc.incarnation, self._node, handle)


def _key(proc: Proc) -> tuple[str, int, int]:
    return proc.seat, proc.incarnation, proc.pid


def _proc(seat: str, incarnation: int, handle: ProcessHandle) -> Proc:
    return Proc(
        seat=seat,
        incarnation=incarnation,
        pid=handle.pid,
        start_ticks=handle.start_ticks,
        pgid=handle.pgid,
    )


def run_ref(run_id: str, run_dir: str) -> RunRef:
    """The run by its id; its directory on this node is another one than on the head."""
    return RunRef(run_id, Path(run_dir).resolve())
