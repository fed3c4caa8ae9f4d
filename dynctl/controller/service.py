"""The controller's sockets, processes and clock around the supervisor, which decides.

For each node one task carries out the supervisor's instructions in order, so that a node that hangs holds
up none of the others; the state is on disk before any of them is. Everything else (calls, leases, exits,
time) only feeds events in.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import msgspec

from dynctl.controller import handover
from dynctl.controller.claims import Claims
from dynctl.controller.day2 import OPS, Day2, Desk
from dynctl.controller.moves import (
    Begin,
    Event,
    Exited,
    Finish,
    Gone,
    HandOver,
    HandoverFailed,
    Instruction,
    Kill,
    NodeBack,
    NodeLost,
    Note,
    Seen,
    Start,
    Started,
    StartFailed,
    Stop,
    Terminate,
    Tick,
)
from dynctl.controller.moving import More, NoMore
from dynctl.controller.planner_watch import plan_replicas
from dynctl.controller.relocation import Hands, Relocation
from dynctl.controller.supervise import Supervisor
from dynctl.controller.unseen import Unseen, rooms, shown
from dynctl.deploy.events import append_event
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.state import RunState, SeatRecord, encode_state
from dynctl.deploy.status import view_of
from dynctl.discovery.adapters import Adapters
from dynctl.discovery.lease import Changes
from dynctl.discovery.registry import Registry
from dynctl.errors import DiscoveryError, DynctlError, LaunchError
from dynctl.launchers.base import Launch, ProcessHandle
from dynctl.launchers.files import write_atomic
from dynctl.launchers.fleet import Fleet, Seated
from dynctl.protocol.day2 import RoomReply
from dynctl.protocol.deployment import DeploymentView, DownCall, DownReply
from dynctl.protocol.planner import PLANNER_TOPIC
from dynctl.topology.inventory import is_awaited
from dynctl.transport.control import ControlServer, read_body
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

POLL_S = 0.1
POLL_STOPPING_S = 0.02
KILLED_WITHIN_S = 5.0
SAVE_AGAIN_S = 5.0
FAILED_DRAIN_S = 1.0
REST = 3.0
"""After looking at everything it waits so many times as long, whatever happens, if not for the next poll."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a controller works with."""

    run: RunDir
    plan: Plan
    keys: Keys
    fleet: Fleet
    more: More = field(default_factory=NoMore)


class Controller:
    """Starts what the plan says, keeps it alive, and ends it when told to."""

    def __init__(self, parts: Parts, state: RunState) -> None:
        self._parts = parts
        self._state = state
        self._nodes: dict[str, str] = {}
        self._claims = Claims(parts.fleet, state)
        self._day2 = Day2(Desk(parts.run, state, parts.fleet, self._claims, self._changed), parts.plan)
        self._supervisor = Supervisor(state)
        self._relocation = Relocation(
            Hands(
                run=parts.run,
                state=state,
                fleet=parts.fleet,
                claims=self._claims,
                day2=self._day2,
                more=parts.more,
                note=self._note,
                feed=self._feed,
                changed=self._changed,
            )
        )
        self._publisher = Publisher(parts.keys, parts.plan.membership)
        self._registry = Registry(
            self._publisher, on_change=self._members_changed, on_late=self._members_late
        )
        self._registry.want(state.roles)
        self._adapters = Adapters(_content(parts.run.adapters), partial(write_atomic, parts.run.adapters))
        self._server = ControlServer(parts.keys, parts.plan.registry, self._answer)
        self._lanes: dict[str, deque[Instruction]] = {}
        self._working: dict[str, asyncio.Task[None]] = {}
        self._lost: dict[str, Unseen] = {}
        self._planner: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._saved = b""
        self._on_disk: dict[str, int] = {}
        self._seated: dict[str, Seated] = {}
        self._save_at = 0.0
        self._left = False
        self._finishing = False

    async def _plan(self) -> None:
        tell = partial(self._publisher.publish, PLANNER_TOPIC)
        await plan_replicas(self._parts.run, self._state, self._note, tell)

    async def run(self) -> None:
        """Until the deployment is ended or this process is told to leave. Raises PortInUse, LaunchError."""
        self._publisher.start()
        try:
            # Asked before anybody can register: what is seen must not be overtaken by what was found.
            alive = await self._living()
            self._server.start()
            self._registry.start()
            self._take_over(alive)
            self._planner = asyncio.create_task(self._plan(), name="planner")
            await self._work()
        finally:
            await self._end_lanes()
            await self._relocation.close()
            await self._claims.close()
            if self._finishing:
                await self._parts.more.dismiss()
                await self._parts.fleet.dismiss()
            await self._parts.more.close()
            await self._parts.fleet.close()
            await self._server.close()
            await self._registry.close()
            self._publisher.close()

    def leave(self) -> None:
        """Exit and let everything run on: another controller may take over."""
        self._left = True
        self._wake.set()

    def end(self, drain_s: float, why: str) -> None:
        """End the deployment as `dynctl down` does; `why` is for the events."""
        self._note("deployment.told_to_end", {"by": why, "drain_s": drain_s})
        self._feed(Stop(drain_s))

    async def _living(self) -> set[str]:
        """The seats whose recorded process lives already."""
        recorded = [_seated(seat) for seat in self._state.seats if seat.incarnation and seat.pid]
        for seat, giver in handover.handed_over(self._state):
            taker = replace(_seated(giver), seat=seat.id, incarnation=seat.incarnation, started=None)
            recorded.append(taker)
        lives = await asyncio.gather(*map(self._parts.fleet.lives, recorded))
        return {seated.seat for seated, living in zip(recorded, lives, strict=True) if living}

    def _take_over(self, alive: set[str]) -> None:
        """Tell the registry and the supervisor what lives already."""
        for seat in self._state.seats:
            if seat.incarnation:
                self._registry.set_current(seat.id, seat.incarnation)
        self._note("controller.started", {"pid": self._state.controller.pid, "adopted": len(alive)})
        self._feed(Begin(frozenset(alive)))
        for node in {seat.node for seat in self._state.seats if seat.incarnation}:
            self._look_at(node)  # the controller before may have known it to be lost

    # Events in

    def _feed(self, event: Event) -> None:
        """Hand an event to the supervisor, and what it orders to the nodes it is about."""
        for instruction in self._supervisor.handle(event, time.monotonic()):
            match instruction:
                case Note(name, fields):
                    self._note(name, fields)
                case Finish():
                    self._finishing = True
                    self._wake.set()
                case Start() | HandOver() | Terminate() | Kill():
                    self._order(self._node_of(instruction.id), instruction)

    def _order(self, node: str, instruction: Instruction) -> None:
        self._lanes.setdefault(node, deque()).append(instruction)
        if node not in self._working:
            task = asyncio.get_running_loop().create_task(self._carry_out_all(node), name=f"node {node}")
            self._working[node] = task
        self._wake.set()

    def _node_of(self, seat_id: str) -> str:
        """Where a seat is, or was before it left."""
        seat = self._state.seat(seat_id)
        if seat is not None:
            self._nodes[seat_id] = seat.node
        return self._nodes.get(seat_id, "")

    def _changed(self) -> None:
        """The state has been changed by a verb: act on it."""
        self._registry.want(self._state.roles)
        self._feed(Tick())
        self._save(again=False)

    def _members_changed(self, changes: Changes) -> None:
        for seat_id in changes.removed:
            seat = self._state.seat(seat_id)
            if seat is not None:
                self._feed(Gone(seat_id, seat.incarnation))
                self._doubt(seat.node)
        for member in changes.upserts:
            instance = member.instance
            self._feed(
                Seen(instance.id, instance.incarnation, member.state, instance.url, instance.engine_pid)
            )
        self._wake.set()

    def _members_late(self, late: frozenset[str]) -> None:
        for node in {seat.node for seat in self._state.seats if seat.id in late}:
            self._doubt(node, late)

    def _doubt(self, node: str, late: frozenset[str] = frozenset()) -> None:
        """Have a node looked at of which nobody renews any more; `late`: seats that let a renewal go by."""
        there = [seat for seat in self._state.seats if seat.node == node and seat.pid and not seat.follower]
        if there and all(seat.state == "lost" or seat.id in late for seat in there):
            self._look_at(node)

    def _look_at(self, node: str) -> None:
        if node == self._state.head or is_awaited(node):
            return
        plan = self._day2.plan
        ports = [p.ports["control"] for p in plan.processes if p.node == node and "control" in p.ports]
        ports += [p for one in plan.nodes if one.name == node for p in one.ports]
        addresses = [one.address for one in plan.nodes if one.name == node]
        if ports and addresses:
            self._parts.fleet.doubt(node, addresses[0], ports[0])

    async def _answer(self, op: str, body: msgspec.Raw) -> msgspec.Struct | None:
        if op.startswith("registry."):
            return await self._registry.handle(op, body)
        if op.startswith("adapters."):
            return self._adapters.handle(op, body)
        if op in ("controller.ps", "controller.status"):
            return self._view()
        if op == "controller.down":
            drain_s = read_body(body, DownCall).drain_s
            self._feed(Stop(max(0.0, drain_s)))
            return DownReply(controller_pid=self._state.controller.pid)
        if op == "controller.room":
            return RoomReply(nodes={**rooms(self._lost), **await self._parts.fleet.room()})
        if op in OPS:
            return await self._day2.handle(op, body)
        hint = "registry.*, adapters.*, controller.ps, .status, .down, .room, .apply, .drain, .lock or .exec"
        raise DiscoveryError(f"unknown op {op!r}", hint=hint)

    def _view(self) -> DeploymentView:
        seen = view_of(self._state, str(self._parts.run.path), _believed)
        agents = {node.name for node in self._day2.plan.nodes if node.agent}
        unseen = shown(self._lost, self._state, agents, time.monotonic())
        why = "; ".join(filter(None, (seen.reason, self._parts.more.told())))
        return msgspec.structs.replace(seen, reason=why, at=time.time(), unseen=unseen)

    def _poll(self) -> None:
        """Look which processes have ended."""
        before, self._seated = self._seated, {}
        for seat in self._state.seats:
            if seat.pid:
                known = before.get(seat.id)
                same = known and (known.incarnation, known.handle.pid) == (seat.incarnation, seat.pid)
                self._seated[seat.id] = known if known and same else _seated(seat)
        for one in self._parts.fleet.ended(list(self._seated.values())):
            self._registry.gone(one.seat, one.incarnation)
            self._feed(Exited(one.seat, one.incarnation, one.code, one.words, one.lines))
            for process in (p for p in self._day2.plan.processes if p.id == one.seat):
                for node, _ in process.also:
                    self._look_at(node)  # nothing of ours there renews anything

    def _hear(self) -> None:
        """Take over which nodes can be reached."""
        for news in self._parts.fleet.news():
            if news.reachable:
                self._lost.pop(news.node, None)
                self._claims.forget(news.node)
                self._feed(NodeBack(news.node))
                for seat_id, incarnation in self._relocation.left_on(news.node).items():
                    self._order(news.node, Kill(seat_id, incarnation))
            else:
                self._lost[news.node] = Unseen.of(news, time.monotonic())
                self._feed(NodeLost(news.node, news.why))
                self._registry.unreachable([s.id for s in self._state.seats if s.node == news.node])

    def _see_to_moves(self) -> None:
        """Have what has no node started elsewhere."""
        if self._state.ready_once and not self._supervisor.stopping:
            self._relocation.see_to(frozenset(self._lost))

    # Instructions out

    async def _work(self) -> None:
        while not (self._finished() or self._left):
            begun = time.monotonic()
            self._wake.clear()
            self._hear()
            self._poll()
            self._see_to_moves()
            self._feed(Tick())
            self._day2.prune()
            if not self._supervisor.stopping:
                self._claims.see_to(self._day2.plan, {*self._working, *self._lost})
            self._save(again=False)
            if not (self._finished() or self._left):
                limit_s = POLL_STOPPING_S if self._supervisor.stopping else POLL_S
                await asyncio.sleep(min(limit_s, REST * (time.monotonic() - begun)))
                await self._pause(limit_s)
        self._save()
        if self._left:
            self._note("controller.left", {"pid": self._state.controller.pid})

    def _finished(self) -> bool:
        return self._finishing and not self._working

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _carry_out_all(self, node: str) -> None:
        """Carry out what is ordered for one node, one after another, until nothing is."""
        lane = self._lanes[node]
        try:
            while lane and not self._left:
                instruction = lane.popleft()
                try:
                    await self._carry_out(node, instruction)
                except Exception:
                    # The top of a task: one order that breaks must not stop those behind it.
                    logger.exception("order.failed node=%s order=%s", node, instruction)
                self._wake.set()
        finally:
            del self._working[node]
            self._wake.set()

    async def _end_lanes(self) -> None:
        tasks = [*self._working.values(), *([self._planner] if self._planner is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _carry_out(self, node: str, instruction: Instruction) -> None:
        match instruction:
            case Start(seat_id, incarnation):
                await self._start(seat_id, incarnation)
            case HandOver():
                await self._hand_over(instruction)
            case Terminate(seat_id):
                await self._terminate(seat_id)
            case Kill(seat_id, incarnation):
                await self._kill(node, seat_id, incarnation)

    async def _start(self, seat_id: str, incarnation: int) -> None:
        seat = self._state.seat(seat_id)
        if seat is None or seat.incarnation != incarnation or seat.state != "starting":
            return  # overtaken by a later decision
        if self._on_disk.get(seat_id) != incarnation and not self._save():
            message = "the run directory cannot be written"
            self._feed(StartFailed(seat_id, incarnation, message, permanent=False))
            return
        self._registry.set_current(seat_id, incarnation)
        process = self._day2.plan.process(seat_id)
        seat.node = process.node
        launch = Launch(seat_id, incarnation, process.command, process.node)
        try:
            handle = await self._parts.fleet.start(launch)
        except LaunchError as error:
            once = not seat.ever_ready
            self._feed(StartFailed(seat_id, incarnation, str(error), permanent=once, kind=error.kind))
            return
        self._feed(Started(seat_id, incarnation, handle.pid, handle.start_ticks, handle.pgid, time.time()))

    async def _hand_over(self, order: HandOver) -> None:
        seat, taker = self._state.seat(order.id), self._state.seat(order.to)
        if seat is None or taker is None or seat.state != "stopping":
            return  # overtaken by a later decision
        incarnation = seat.incarnation
        held = {m.instance.id: m.instance.control for m in self._registry.members()}
        try:
            if self._on_disk.get(order.to) != order.incarnation and not self._save():
                raise LaunchError("the run directory cannot be written")
            if order.id not in held:
                raise DiscoveryError("it holds no lease")
            self._registry.set_current(order.to, order.incarnation)
            process = self._day2.plan.process(order.to)
            await handover.ask(self._parts.keys, held[order.id], process, order.incarnation)
        except DynctlError as error:
            self._feed(HandoverFailed(order.id, incarnation, str(error)))

    async def _terminate(self, seat_id: str) -> None:
        seat = self._state.seat(seat_id)
        if seat is not None and seat.pid:
            await self._parts.fleet.signal(_seated(seat), signal.SIGTERM)

    async def _kill(self, node: str, seat_id: str, incarnation: int) -> None:
        """End what is left of a seat and see it gone, so that its ports are free."""
        left = await self._parts.fleet.clear(node, seat_id, incarnation, KILLED_WITHIN_S)
        if left:
            self._note("process.unkillable", {"id": seat_id, "pids": " ".join(map(str, left))})

    def _save(self, *, again: bool = True) -> bool:
        """Put the state on disk if it has changed; whether it is there.

        `again` false: not so soon after a failure. Before the deployment has ever been ready, a state that
        cannot be written ends it: nobody could see or find it.
        """
        encoded = msgspec.json.encode(self._state)
        if encoded == self._saved:
            return True
        if not again and time.monotonic() < self._save_at:
            return False
        try:
            write_atomic(self._parts.run.state, encode_state(self._state))
        except OSError as error:
            # A full disk must not end what serves: said in the log, tried again a little later.
            logger.error("state.unwritable path=%s error=%s", self._parts.run.state, error)
            self._save_at = time.monotonic() + SAVE_AGAIN_S
            if not self._state.ready_once and not self._supervisor.stopping:
                self._feed(Stop(FAILED_DRAIN_S, f"the run directory cannot be written: {error.strerror}"))
            return False
        self._saved = encoded
        self._on_disk = {seat.id: seat.incarnation for seat in self._state.seats}
        return True

    def _note(self, event: str, fields: dict[str, str | int | float]) -> None:
        logger.info("%s %s", event, " ".join(f"{k}={v}" for k, v in fields.items()))
        try:
            append_event(self._parts.run.events, time.time(), event, **fields)
        except OSError as error:
            # As for the state: the event is in the log, where there is room.
            logger.error("events.unwritable error=%s", error)


def _believed(pid: int, start_ticks: int) -> bool:
    """Whoever has a pid in the state lives, as far as this controller knows: it is told of each end."""
    return True


def _seated(seat: SeatRecord) -> Seated:
    handle = ProcessHandle(seat.pid, seat.start_ticks, seat.pgid)
    return Seated(seat.id, seat.incarnation, seat.node, handle, seat.engine_of)


def _content(path: Path) -> bytes:
    """A file's content, b"" when there is none. Raises LaunchError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise LaunchError(f"it cannot be read: {error.strerror}", where=str(path)) from error


def run_dir_of(path: str) -> RunDir:
    """The run directory named on the command line, absolute."""
    return RunDir(Path(path).resolve())
