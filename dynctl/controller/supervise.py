"""What to do about the processes of a deployment: events in, instructions out. Pure: time is passed in.

`Supervisor.handle(event, now)` changes the run's state and returns instructions, to be carried out in order
after the state is on disk. `now` is monotonic, in seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynctl.controller.handover import give, kills, receive
from dynctl.controller.moves import (
    Begin,
    Event,
    Exited,
    Gone,
    HandoverFailed,
    Instruction,
    Moved,
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
from dynctl.controller.rolling import Drop, Give, Halt, Open, Part, changing, moves, settled
from dynctl.controller.verdict import URGENCY, Failure, describe_exit, gives_up, reason_of, signature
from dynctl.controller.way_down import WayDown
from dynctl.deploy.state import RunState, SeatRecord, stop_margin_of
from dynctl.errors import NodeSilent
from dynctl.topology.inventory import is_awaited

HURRY_S = 2.0
"""Beyond the time that a process has for its requests by its own clock, which should come first."""
HANDOVER_S = 15.0
"""Then for a sidecar to become another's and register."""


@dataclass(frozen=True, slots=True)
class Times:
    """Back-off and deadlines, in seconds."""

    backoff_s: float = 1.0
    backoff_max_s: float = 30.0
    stable_s: float = 60.0
    start_margin_s: float = 30.0
    """Beyond the process's own time-out, which should come first and knows more."""
    renew_s: float = 20.0
    """For a process whose lease ran out, or that a new controller has found, to register again."""
    unseen_s: float = 30.0
    """For a node that falls silent before all was ready for the first time to answer again."""
    kill_s: float = 10.0
    failed_drain_s: float = 1.0
    """For what runs already when the deployment fails to start: nobody has used it yet."""


@dataclass(slots=True)
class _Watch:
    """What is remembered of a seat between events but not on disk."""

    deadline: float = 0.0
    ready_since: float = 0.0
    failures: int = 0
    verdict: str = ""
    hurry_at: float = 0.0
    """When one that drains is told to leave its requests to others; 0 = it has been."""
    unsure: bool = False
    """Whether it has ever been asked to end: the controller before may have died on the point of it."""


class Supervisor:
    """Keeps `state` true to what happens and says what to do."""

    def __init__(self, state: RunState, times: Times | None = None) -> None:
        self.state = state
        self._times = times or Times()
        self._watch: dict[str, _Watch] = defaultdict(_Watch)
        self._stopping: WayDown | None = None
        self._lost_nodes: dict[str, str] = {}
        self._lost_at: dict[str, float] = {}
        self._out: list[Instruction] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            Begin: self._begin,
            Started: self._started,
            StartFailed: self._start_failed,
            Seen: self._seen,
            Gone: self._gone,
            NodeLost: self._node_lost,
            NodeBack: self._node_back,
            Moved: self._moved,
            Exited: self._exited,
            HandoverFailed: self._handover_failed,
            Tick: self._tick,
            Stop: self._stop,
        }

    @property
    def stopping(self) -> bool:
        """Whether the way down has begun."""
        return self._stopping is not None

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event; what is to be done, in order."""
        self._handlers[type(event)](event, now)
        if self._stopping is None:
            self._roll(now)
            self._judge_phase()
        else:
            self._stopping.go_on(now)
        out, self._out = self._out, []
        return out

    # Starting

    def _begin(self, event: Begin, now: float) -> None:
        self.state.phase = "degraded" if self.state.ready_once else "starting"
        for seat in self.state.seats:
            if seat.id in event.alive and seat.takes:
                receive(self.state, seat)
        for seat in self.state.seats:
            if seat.id in event.alive:
                self._note("process.adopted", seat, pid=seat.pid)
                if seat.state == "stopping":
                    self._give_time(seat, now)
                    self._watch[seat.id].unsure = True
                    continue
                wait = self._times.renew_s if seat.was_ready else self._start_wait(seat)
                self._watch[seat.id].deadline = now + wait
                seat.state = "ready" if seat.follower else "starting"
            elif (
                seat.asked in ("drain", "leave")
                or is_awaited(seat.node)
                or (self.state.ready_once and seat.state == "waiting")
            ):
                seat.state = "waiting"
                seat.pid = seat.start_ticks = seat.pgid = seat.engine_pid = 0
            else:
                seat.failed_starts, seat.failure = 0, ""
                self._start(seat, now)

    def _start(self, seat: SeatRecord, now: float, *, clear: bool = True) -> None:
        """`clear`: what is left of the incarnation before is ended first."""
        if seat.incarnation:
            seat.restarts += 1
            if clear:
                self._out += kills(self.state, seat)
        seat.incarnation += 1
        seat.state, seat.was_ready = "starting", False
        seat.built, seat.drain_limit_s = seat.digest, 0.0
        seat.asked = "" if seat.asked == "restart" else seat.asked
        seat.takes, seat.engine_of = "", None
        seat.pid = seat.start_ticks = seat.pgid = seat.engine_pid = 0
        seat.url = ""
        watch = self._watch[seat.id]
        watch.deadline, watch.verdict = now + self._start_wait(seat), ""
        self._out.append(Start(seat.id, seat.incarnation))

    def _started(self, event: Started, now: float) -> None:
        seat = self._current(event.id, event.incarnation)
        if seat is None:
            return
        if seat.state != "starting":  # the way down began while it was being started
            self._out += kills(self.state, seat)
            return
        seat.pid, seat.start_ticks, seat.pgid = event.pid, event.start_ticks, event.pgid
        seat.started_at = event.wall_s
        self._note("process.started", seat, pid=seat.pid)
        if seat.follower:
            self._mark_ready(seat, now)

    def _start_failed(self, event: StartFailed, now: float) -> None:
        seat = self._current(event.id, event.incarnation)
        if seat is None:
            return
        self._note("process.unstartable", seat, message=event.message)
        failure = Failure(event.message, (), told=True, permanent=event.permanent, kind=event.kind)
        self._failed(seat, failure, now, retry=seat.ever_ready and not event.permanent)

    # Living

    def _seen(self, event: Seen, now: float) -> None:
        seat = self._current(event.id, event.incarnation)
        if seat is not None and seat.state == "stopping" and event.state == "ready":
            self._ask_again(seat)
        if seat is None or seat.state in ("stopping", "stopped", "drained", "failed"):
            return
        before = seat.takes
        if before and receive(self.state, seat):
            self._note("process.took_over", seat, before=before)
        seat.url, seat.engine_pid = event.url, event.engine_pid
        if event.state != "ready":
            if seat.state != event.state:
                seat.state = event.state
                self._note(f"process.{event.state}", seat)
        elif seat.state != "ready":
            self._mark_ready(seat, now)

    def _mark_ready(self, seat: SeatRecord, now: float) -> None:
        seat.state = "ready"
        seat.was_ready = seat.ever_ready = True
        seat.failed_starts, seat.failure, seat.rolled = 0, "", False
        self._watch[seat.id].ready_since = now
        self._note("process.ready", seat, url=seat.url)

    def _gone(self, event: Gone, now: float) -> None:
        seat = self._current(event.id, event.incarnation)
        if seat is not None and seat.state == "ready":
            seat.state = "lost"
            self._watch[seat.id].deadline = now + self._times.renew_s
            self._note("lease.lost", seat)

    def _node_lost(self, event: NodeLost, now: float) -> None:
        """What is on a node that does not answer is left as it is: it may serve on, and must not be twice.
        Whether it does its lease tells; parts of a replica that have none are believed lost.
        """
        self._lost_nodes[event.node] = event.why
        self._lost_at.setdefault(event.node, now)
        self._out.append(Note("node.lost", {"node": event.node, "message": event.why}))
        for seat in self.state.seats:
            if seat.node != event.node:
                continue
            if seat.follower and seat.state == "ready":
                seat.state = "lost"
            elif seat.state == "starting" and self.state.ready_once and (seat.was_ready or not seat.pid):
                # Found by a new controller, and not heard of since; or not started yet.
                seat.state = "lost" if seat.was_ready else "backoff"

    def _node_back(self, event: NodeBack, now: float) -> None:
        """Who lives there is to register again; who has ended is told of by the node."""
        self._lost_nodes.pop(event.node, None)
        self._lost_at.pop(event.node, None)
        self._out.append(Note("node.back", {"node": event.node}))
        for seat in self.state.seats:
            if seat.node == event.node and seat.state == "lost":
                self._watch[seat.id].deadline = now + self._times.renew_s
                if seat.follower:  # it registers nothing
                    self._mark_ready(seat, now)

    def _moved(self, event: Moved, now: float) -> None:
        """Start on other nodes what a lost one had. Should that live on there, it is told that it is replaced
        as soon as it can be told anything.
        """
        for seat in self.state.seats:
            node = event.nodes.get(seat.id)
            if node is None or seat.state in ("stopping", "stopped", "failed", "drained"):
                continue
            self._note("process.moved", seat, node=node, message="the node where it was is lost")
            seat.node = node
            self._start(seat, now, clear=False)

    # Ending

    def _exited(self, event: Exited, now: float) -> None:
        seat = self._current(event.id, event.incarnation)
        if seat is None:
            return
        verdict = self._watch[seat.id].verdict
        failure = describe_exit(event.code, event.words, event.lines, verdict)
        self._note("process.exited", seat, code=event.code, message=failure.message)
        self._out += kills(self.state, seat)
        if seat.node in self._lost_nodes and seat.was_ready and self._stopping is None:
            self._gone_with_its_node(seat, failure, now)
            return
        self._failed(seat, failure, now, retry=False)

    def _gone_with_its_node(self, seat: SeatRecord, failure: Failure, now: float) -> None:
        """It is to start where there is room, or when its node is back: that is no failure of its own."""
        seat.pid = seat.start_ticks = seat.pgid = seat.engine_pid = 0
        seat.state = "stopped" if seat.state == "stopping" else "backoff"
        seat.last_exit, seat.last_kind, seat.last_error = failure.message, failure.kind, []
        self._watch[seat.id].deadline = now

    def _failed(self, seat: SeatRecord, failure: Failure, now: float, *, retry: bool) -> None:
        """A seat has no process any more: back off, or give up."""
        seat.pid = seat.start_ticks = seat.pgid = seat.engine_pid = 0
        if seat.state == "stopping" or self._stopping is not None:
            seat.state = "stopped"
            return
        seat.last_exit, seat.last_kind, seat.last_error = failure.message, failure.kind, list(failure.lines)
        if not seat.was_ready and not retry:
            same = signature(failure) == seat.failure
            seat.failed_starts, seat.failure = seat.failed_starts + 1, signature(failure)
            if gives_up(failure, same=same, failed_starts=seat.failed_starts, ever_ready=seat.ever_ready):
                self._give_up(seat, failure, now)
                return
        self._back_off(seat, now)

    def _back_off(self, seat: SeatRecord, now: float) -> None:
        watch, times = self._watch[seat.id], self._times
        if seat.was_ready and now - watch.ready_since >= times.stable_s:
            watch.failures = 0
        delay = min(times.backoff_max_s, times.backoff_s * 2.0 ** min(watch.failures, 16))
        watch.failures += 1
        watch.deadline = now + delay
        seat.state = "backoff"
        self._note("process.backoff", seat, delay_s=delay)

    def _give_up(self, seat: SeatRecord, failure: Failure, now: float) -> None:
        seat.state = "failed"
        self._note("process.gave_up", seat, message=failure.message)
        if not self.state.ready_once:
            self._stop(Stop(self._times.failed_drain_s, reason_of(seat)), now)

    # Time

    def _tick(self, event: Tick, now: float) -> None:
        for seat in self.state.seats:
            if seat.state not in ("backoff", "starting", "lost"):
                continue
            if self._stopping is not None:
                continue
            watch, why = self._watch[seat.id], self._lost_nodes.get(seat.node)
            if why is not None and not self.state.ready_once:
                if now >= self._lost_at[seat.node] + self._times.unseen_s:
                    self._unseen(seat, why, now)
                continue
            if now < watch.deadline:
                continue
            if why is not None:
                if seat.state == "starting" and not seat.was_ready:
                    self._unseen(seat, why, now)
                continue
            if seat.state == "backoff":
                self._start(seat, now)
            elif not watch.verdict:
                watch.verdict = (
                    "its lease ran out and it did not register again"
                    if seat.state == "lost" or seat.was_ready
                    else f"it was not ready within {self._start_wait(seat):g} s"
                )
                self._note("process.hung", seat, message=watch.verdict)
                self._out += kills(self.state, seat)

    def _unseen(self, seat: SeatRecord, why: str, now: float) -> None:
        """It has not become ready, on a node that nobody can ask about it."""
        served = self.state.ready_once
        seat.was_ready = seat.was_ready and served
        told = NodeSilent(why, where=seat.node)
        failure = Failure(str(told), (), told=True, permanent=not served, kind=told.kind)
        self._failed(seat, failure, now, retry=served)

    # One by one, while it serves

    def _roll(self, now: float) -> None:
        """Replace, drain, add and remove as `rolling` has it."""
        for move in [] if settled(self.state) else moves(self.state, self._lost_nodes):
            seat = self.state.seat(move.id)
            if seat is None:
                continue
            match move:
                case Halt():
                    self._halt(seat, now)
                case Give(to=to):
                    self._give(seat, to, now)
                case Open():
                    self._replace(seat, now)
                case Part():
                    seat.asked = "leave"
                case Drop():
                    self._note("process.removed", seat)
                    self.state.seats.remove(seat)
                    self.state.retired[seat.id] = seat.incarnation
        self._hurry(now)
        said = self.state.changing
        self.state.changing = "" if settled(self.state) else changing(self.state, self._lost_nodes)
        if said and not self.state.changing:
            self._out.append(Note("deployment.changed", {}))

    def _halt(self, seat: SeatRecord, now: float) -> None:
        if not seat.pid:
            seat.state = "drained" if seat.asked == "drain" else "stopped"
            if seat.state == "drained":
                self._note("process.drained", seat)
            return
        seat.state = "stopping"
        self._give_time(seat, now)
        self._note("process.stopping", seat, why=seat.asked or "its plan has changed")
        self._out.append(Terminate(seat.id))

    def _give(self, seat: SeatRecord, to: str, now: float) -> None:
        taker = self.state.seat(to)
        assert taker is not None
        self._out.append(give(seat, taker))
        self._give_time(seat, now)
        self._watch[seat.id].hurry_at += HANDOVER_S
        self._watch[seat.id].deadline += HANDOVER_S
        self._note("process.becoming", seat, to=to)

    def _handover_failed(self, event: HandoverFailed, now: float) -> None:
        """It ends, and what was to take over from it starts an engine of its own."""
        seat = self._current(event.id, event.incarnation)
        if seat is not None and seat.state == "stopping":
            self._note("process.not_handed_over", seat, message=event.message)
            self._give_time(seat, now)
            self._out.append(Terminate(seat.id))

    def _give_time(self, seat: SeatRecord, now: float) -> None:
        """How long its requests may take to end, then be taken over by others, then its engine to exit."""
        drain_s = seat.drain_limit_s or seat.drain_timeout_s
        watch = self._watch[seat.id]
        watch.hurry_at, watch.verdict = now + drain_s + HURRY_S, ""
        watch.deadline = watch.hurry_at + stop_margin_of(self.state)

    def _hurry(self, now: float) -> None:
        for seat in self.state.seats:
            if seat.state != "stopping" or seat.node in self._lost_nodes:
                continue
            watch = self._watch[seat.id]
            if watch.hurry_at and now >= watch.hurry_at:
                watch.hurry_at = 0.0
                self._out.append(Terminate(seat.id))
            if now >= watch.deadline and not watch.verdict:
                watch.verdict = "it did not end in time"
                self._note("process.hung", seat, message=watch.verdict)
                self._out += kills(self.state, seat)

    def _ask_again(self, seat: SeatRecord) -> None:
        """It serves on: the controller before had not come to ask it to end."""
        if self._watch[seat.id].unsure:
            self._watch[seat.id].unsure = False
            self._out.append(Terminate(seat.id))

    def _replace(self, seat: SeatRecord, now: float) -> None:
        if seat.built != seat.digest:
            # What it is started with is new: whether that works is not known from what was.
            seat.ever_ready = False
        seat.failed_starts, seat.failure, seat.rolled = 0, "", True
        self._watch[seat.id].failures = 0
        planned = bool(seat.incarnation)
        self._start(seat, now)
        seat.restarts -= planned
        seat.last_exit, seat.last_error = "", []

    # The way down

    def _stop(self, event: Stop, now: float) -> None:
        if self._stopping is not None:
            self._stopping.sooner(event.drain_s, now)
            return
        self._stopping = WayDown(self.state, self._lost_nodes, self._put, self._times.kill_s)
        self._stopping.begin(event, now)

    # What it all means

    def _judge_phase(self) -> None:
        state = self.state
        waiting = [
            s
            for s in state.seats
            if s.state != "ready" and s.asked != "leave" and not s.surge and not is_awaited(s.node)
        ]
        before = state.phase
        if not waiting:
            state.phase, state.ready_once, state.reason = "ready", True, ""
        else:
            state.phase = "degraded" if state.ready_once else "starting"
            worst = min(waiting, key=lambda s: URGENCY.get(s.state, 9))
            why, state.reason = self._lost_nodes.get(worst.node), reason_of(worst)
            if why is not None and why not in state.reason:
                state.reason = f"{worst.node}: {why}: {state.reason}"
        if state.phase != before:
            told = {"url": state.url} if state.phase == "ready" else {"reason": state.reason}
            self._out.append(Note(f"deployment.{state.phase}", dict[str, Any](told)))

    def _current(self, seat_id: str, incarnation: int) -> SeatRecord | None:
        """The seat, if this incarnation of it is the current one."""
        seat = self.state.seat(seat_id)
        return seat if seat is not None and seat.incarnation == incarnation else None

    def _start_wait(self, seat: SeatRecord) -> float:
        return seat.start_timeout_s + self._times.start_margin_s

    def _put(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    def _note(self, event: str, seat: SeatRecord, **fields: Any) -> None:
        kept = {k: v for k, v in fields.items() if v is not None}
        self._out.append(Note(event, {"id": seat.id, "incarnation": seat.incarnation, **kept}))
