"""How a deployment is ended: its frontends, then its workers, then by force what is left. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from dynctl.controller.handover import kills
from dynctl.controller.moves import Finish, Instruction, Note, Stop, Terminate
from dynctl.deploy.state import RunState, SeatKind, SeatRecord, stop_margin_of
from dynctl.protocol.deployment import Phase


class WayDown:
    """Changes `state` and gives out instructions by `put`. `kill_s` is how long what is killed may take.

    What is on `lost_nodes` (name, why), which may change meanwhile, is not waited for.
    """

    def __init__(
        self,
        state: RunState,
        lost_nodes: Mapping[str, str],
        put: Callable[[Instruction], None],
        kill_s: float,
    ) -> None:
        self._state = state
        self._lost_nodes = lost_nodes
        self._put = put
        self._kill_s = kill_s
        self._drain_s = 0.0
        self._stage: Literal["frontend", "worker", "killed"] = "frontend"
        """Who is being ended now."""
        self._deadline = 0.0
        self._final: Phase = "stopped"
        self._finished = False

    def begin(self, event: Stop, now: float) -> None:
        """Ask the frontends to end."""
        self._drain_s = event.drain_s
        self._final = "failed" if event.failure else "stopped"
        self._state.phase, self._state.reason = "stopping", event.failure
        self._put(Note("deployment.stopping", {"drain_s": event.drain_s, "reason": event.failure}))
        for seat in self._state.seats:
            if not seat.pid and seat.state != "failed":
                seat.state = "stopped"
        self._enter("frontend", now)

    def sooner(self, drain_s: float, now: float) -> None:
        """Asked again: only ever sooner."""
        self._deadline = min(self._deadline, now + self._wait(drain_s))
        self._drain_s = min(self._drain_s, drain_s)

    def go_on(self, now: float) -> None:
        """The next stage, when this one is over or has had its time."""
        if self._finished:
            return
        if self._stage == "frontend" and not self._alive("frontend"):
            self._enter("worker", now)
        left = self._alive("frontend") + self._alive("worker")
        late = now >= self._deadline
        if not left or (late and self._stage == "killed"):
            self._finish()
        elif late:
            self._stage, self._deadline = "killed", now + self._kill_s
            for seat in left:
                seat.state = "stopping"
                for kill in kills(self._state, seat):
                    self._put(kill)

    def _enter(self, stage: SeatKind, now: float) -> None:
        """Ask the processes of one kind to end."""
        self._stage = stage
        wait = self._wait(self._drain_s)
        self._deadline = now + wait
        for seat in self._alive(stage):
            seat.state = "stopping"
            if wait:
                self._put(Terminate(seat.id))

    def _wait(self, drain_s: float) -> float:
        """Seconds for one kind of processes to drain and exit; 0 = they are killed at once."""
        return drain_s + stop_margin_of(self._state) if drain_s else 0.0

    def _finish(self) -> None:
        self._finished = True
        for seat in self._state.seats:
            if seat.pid and seat.node in self._lost_nodes:
                fields = {"id": seat.id, "incarnation": seat.incarnation, "node": seat.node}
                self._put(Note("process.left_behind", fields))
        self._state.phase = self._final
        self._put(Note(f"deployment.{self._final}", {"reason": self._state.reason}))
        self._put(Finish())

    def _alive(self, kind: SeatKind) -> list[SeatRecord]:
        """Who lives and can be ended: not what is on a lost node."""
        alive = [seat for seat in self._state.seats if seat.kind == kind and seat.pid]
        return [seat for seat in alive if seat.node not in self._lost_nodes]
