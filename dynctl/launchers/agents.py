"""A fleet of nodes that each have an agent: what is ordered and asked goes by authenticated calls.

One task for each node asks again and again what has ended there and what was logged; a node that has not
answered for `LOST_S` is told of as lost, and as back when it answers again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from dynctl.errors import DynctlError, LaunchError, NodeSilent, PlacementError, TransportError
from dynctl.launchers.base import Launch, ProcessHandle
from dynctl.launchers.fleet import Ended, NodeNews, Seated
from dynctl.launchers.log_copies import LogCopies
from dynctl.protocol.agent import (
    ClearCall,
    ClearReply,
    Found,
    HoldCall,
    LivesCall,
    LogReply,
    LookCall,
    LookReply,
    NodeExec,
    Proc,
    SignalCall,
    StartCall,
)
from dynctl.protocol.day2 import ExecReply, NodeRoom
from dynctl.transport.control import ControlClient
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

LOOK_S = 0.25
LOOK_DEADLINE_S = 1.5
LOST_S = 3.0
START_DEADLINE_S = 15.0
CALL_DEADLINE_S = 3.0
HOLD_DEADLINE_S = 5.0
LEAVE_S = 1.0
SILENT = "its agent does not answer"


class _Node:
    """One agent, and what is known of its node."""

    def __init__(self, name: str, client: ControlClient, copies: LogCopies | None) -> None:
        self.name = name
        self.copies = copies
        self.client = client
        self.seated: list[Seated] = []
        self.heard_at = time.monotonic()
        self.reachable = True
        self.asked = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class AgentFleet:
    """Nodes by name, each with its agent's endpoint. Make and use it inside a running loop.

    Logs of all nodes but `head`, where this is, are copied into the folder `logs`.
    """

    def __init__(self, keys: Keys, endpoints: Mapping[str, str], head: str, logs: Path) -> None:
        self._nodes = {
            name: _Node(name, ControlClient(keys, at), None if name == head else LogCopies(logs, name))
            for name, at in endpoints.items()
        }
        self._ended: dict[tuple[str, int], Ended] = {}
        self._news: list[NodeNews] = []
        for node in self._nodes.values():
            node.task = asyncio.get_running_loop().create_task(self._follow(node), name=f"look {node.name}")

    async def start(self, launch: Launch) -> ProcessHandle:
        """As `Fleet`. The node's agent ends what is left of earlier incarnations first."""
        command = launch.command
        call = StartCall(
            seat=launch.process_id,
            incarnation=launch.incarnation,
            argv=list(command.argv),
            env=dict(command.env),
            cwd=command.cwd or "",
            files=dict(command.files),
        )
        try:
            proc = await self._node(launch.node).client.call("agent.start", call, Proc, START_DEADLINE_S)
        except TransportError as error:
            logger.info("agent.silent node=%s error=%s", launch.node, error)
            raise NodeSilent(SILENT, where=launch.node) from error
        except LaunchError as error:
            raise LaunchError(error.message, where=launch.node, hint=error.hint) from error
        return ProcessHandle(proc.pid, proc.start_ticks, proc.pgid)

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """As `Fleet`: what the nodes have told since the last call."""
        by_node: dict[str, list[Seated]] = {name: [] for name in self._nodes}
        for seated in seats:
            by_node.setdefault(seated.node, []).append(seated)
        for name, node in self._nodes.items():
            node.seated = by_node[name]
        current = {(seated.seat, seated.incarnation) for seated in seats}
        told, self._ended = list(self._ended.items()), {}
        return [end for key, end in told if key in current]

    def news(self) -> list[NodeNews]:
        """As `Fleet`."""
        news, self._news = self._news, []
        return news

    def doubt(self, node: str, address: str, port: int) -> None:
        """Nothing: its agent is asked all the time."""

    async def signal(self, seated: Seated, signum: int) -> bool:
        """As `Fleet`."""
        call = SignalCall(proc=_proc(seated), signum=signum)
        try:
            answer = await self._node(seated.node).client.call("agent.signal", call, Found, CALL_DEADLINE_S)
        except DynctlError as error:
            logger.warning("signal.failed seat=%s node=%s error=%s", seated.seat, seated.node, error)
            return False
        return answer.found

    async def clear(self, node: str, seat: str, incarnation: int, within_s: float) -> list[int]:
        """As `Fleet`."""
        call = ClearCall(seat=seat, incarnation=incarnation, within_s=within_s)
        deadline_s = within_s + CALL_DEADLINE_S if self._node(node).reachable else LOOK_DEADLINE_S
        try:
            answer = await self._node(node).client.call("agent.clear", call, ClearReply, deadline_s)
        except DynctlError as error:
            logger.warning("clear.failed seat=%s node=%s error=%s", seat, node, error)
            return [-1]
        return answer.left

    async def lives(self, seated: Seated) -> bool:
        """As `Fleet`."""
        call = LivesCall(proc=_proc(seated))
        try:
            answer = await self._node(seated.node).client.call("agent.lives", call, Found, CALL_DEADLINE_S)
        except DynctlError as error:
            logger.warning("node.silent seat=%s node=%s error=%s", seated.seat, seated.node, error)
            return True
        return answer.found

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """As `Fleet`."""
        command = launch.command
        call = NodeExec(
            seat=launch.process_id,
            argv=list(command.argv),
            env=dict(command.env),
            cwd=command.cwd or "",
            timeout_s=timeout_s,
        )
        deadline_s = timeout_s + CALL_DEADLINE_S
        return await self._node(launch.node).client.call("agent.exec", call, ExecReply, deadline_s)

    async def room(self) -> dict[str, NodeRoom]:
        """As `Fleet`: all nodes are asked at once; one known to be lost is not."""

        async def ask(node: _Node) -> NodeRoom:
            if not node.reachable:
                return NodeRoom(lost=SILENT)
            try:
                return await node.client.call("agent.room", None, NodeRoom, CALL_DEADLINE_S)
            except DynctlError as error:
                return NodeRoom(lost=error.message)

        told = await asyncio.gather(*map(ask, self._nodes.values()))
        return dict(zip(self._nodes, told, strict=True))

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """As `Fleet`."""
        call = HoldCall(gpus=sorted(gpus))
        try:
            await self._node(node).client.call("agent.hold", call, type(None), HOLD_DEADLINE_S)
        except TransportError as error:
            raise LaunchError(f"its GPUs cannot be claimed: {error.message}", where=node) from error
        except PlacementError as error:
            raise PlacementError(error.message, where=node, hint=error.hint) from error

    async def dismiss(self) -> None:
        """As `Fleet`: the agents leave too."""

        async def leave(node: _Node) -> None:
            try:
                await self._copy_logs(node, LEAVE_S)
            except DynctlError as error:
                logger.warning("logs.left_behind node=%s error=%s", node.name, error)
            try:
                await node.client.call("agent.leave", None, type(None), LEAVE_S)
            except DynctlError as error:
                logger.warning("agent.left_behind node=%s error=%s", node.name, error)

        await asyncio.gather(*(leave(node) for node in self._nodes.values()))

    async def close(self) -> None:
        """As `Fleet`."""
        tasks = [node.task for node in self._nodes.values() if node.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for node in self._nodes.values():
            node.client.close()

    def _node(self, name: str) -> _Node:
        node = self._nodes.get(name)
        if node is None:
            raise LaunchError(f"there is no agent on node '{name}'", where=name)
        return node

    async def _follow(self, node: _Node) -> None:
        """Ask what has ended, for ever."""
        while True:
            try:
                if await self._look(node):
                    await self._copy_logs(node, LOOK_DEADLINE_S)
            except TransportError as error:
                logger.debug("logs.late node=%s error=%s", node.name, error)
            except Exception:
                # The top of a task: what a node answers must not end the watch over it.
                logger.exception("look.failed node=%s", node.name)
            await asyncio.sleep(LOOK_S)

    async def _look(self, node: _Node) -> bool:
        """Whether it has answered."""
        call = LookCall(procs=[_proc(seated) for seated in node.seated])
        try:
            answer = await node.client.call("agent.look", call, LookReply, LOOK_DEADLINE_S)
        except DynctlError as error:
            silent_s = time.monotonic() - node.heard_at
            if node.reachable and silent_s > LOST_S:
                node.reachable = False
                logger.info("agent.silent node=%s error=%s", node.name, error)
                self._news.append(NodeNews(node.name, False, SILENT, silent_s))
            return False
        node.heard_at = time.monotonic()
        if not node.reachable:
            node.reachable = True
            self._news.append(NodeNews(node.name, True))
        for end in answer.ended:
            told = Ended(end.seat, end.incarnation, end.code, end.words, tuple(end.lines))
            self._ended[end.seat, end.incarnation] = told
        return True

    async def _copy_logs(self, node: _Node, deadline_s: float) -> None:
        """Take over what was logged there. Raises TransportError."""
        more = node.copies is not None
        while more:
            assert node.copies is not None
            answer = await node.client.call("agent.logs", node.copies.call(), LogReply, deadline_s)
            node.copies.take(answer.parts)
            more = answer.more


def _proc(seated: Seated) -> Proc:
    handle = seated.handle
    return Proc(
        seat=seated.seat,
        incarnation=seated.incarnation,
        pid=handle.pid,
        start_ticks=handle.start_ticks,
        pgid=handle.pgid,
    )
