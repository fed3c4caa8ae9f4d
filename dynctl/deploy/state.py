"""The state of a run as it is kept on disk: what was started, as which incarnation, and how it is.

Written by the controller before it acts (an incarnation is on disk before it is started) and after each
change. Whoever reads it must still ask whether a pid is alive: see `deploy.status`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import msgspec

from dynctl.errors import CodecError
from dynctl.launchers.files import write_atomic
from dynctl.protocol.deployment import Phase, SeatState

logger = logging.getLogger(__name__)

STATE_VERSION = 1
ENDED: tuple[Phase, ...] = ("stopped", "failed")
LEAST_STOP_MARGIN_S = 12.0
"""For engines to exit once their requests are done, whatever the recipe says."""
_SIDECAR_S = 2.0

SeatKind = Literal["worker", "frontend"]


class SeatRecord(msgspec.Struct, kw_only=True):
    """One process that the controller looks after.

    `start_ticks` tells its pid from a later process with the same pid. `follower`: the sidecar of a further
    node of a replica, which registers nothing. `started_at` is Unix time in seconds. `ever_ready`: some
    incarnation of it has been ready; `was_ready`: this one has. `last_kind` is the kind of its last error.
    `drain_timeout_s` is the time its spec gives requests to end, `stop_timeout_s` then its engine to exit.

    `digest` is what it is to be started with (`deploy.reseat`), `built` what its incarnation was; one whose
    two differ is replaced. `asked`: replaced all the same; drained, and kept so; or to leave for good.
    `drain_limit_s` is the time a user gave it for that (0: the spec's). `surge`: it only stands in while
    others of its role are replaced. `rolled`: its incarnation took the place of one that was well.
    `takes`: the seat whose running engine it is to go on with, until it has or that is gone; `engine_of`: the
    seat and incarnation that its engine was started as, where those are others.
    """

    id: str
    kind: SeatKind
    role: str
    index: int
    node: str
    start_timeout_s: float
    drain_timeout_s: float = 30.0
    stop_timeout_s: float = 0.0
    follower: bool = False
    state: SeatState = "waiting"
    incarnation: int = 0
    pid: int = 0
    start_ticks: int = 0
    pgid: int = 0
    restarts: int = 0
    started_at: float = 0.0
    url: str = ""
    engine_pid: int = 0
    was_ready: bool = False
    ever_ready: bool = False
    failed_starts: int = 0
    failure: str = ""
    last_exit: str = ""
    last_kind: str = ""
    last_error: list[str] = []
    gpus: list[int] = []
    digest: str = ""
    built: str = ""
    asked: Literal["", "restart", "drain", "leave"] = ""
    drain_limit_s: float = 0.0
    surge: bool = False
    rolled: bool = False
    takes: str = ""
    engine_of: tuple[str, int] | None = None


class LockRecord(msgspec.Struct, kw_only=True, frozen=True):
    """Why nobody is to change the deployment, who says so, and since when (Unix time)."""

    message: str
    user: str
    host: str
    at: float


class ControllerRecord(msgspec.Struct, kw_only=True):
    """The controller that wrote the state."""

    pid: int = 0
    start_ticks: int = 0
    incarnation: int = 0


class RunState(msgspec.Struct, kw_only=True):
    """A whole run. `ready_once` tells "degraded" from "starting"; `reason` why it is not ready.

    `registry` is the endpoint of the controller's control socket, `head` the node that it runs on: pids of
    seats on other nodes mean nothing there. `changing` is what is being replaced, added or removed now, for
    people ("" = nothing); `planner` how the planner is ("" = there is none). `retired` is the last
    incarnation of seats that have left: should one of them come back, it goes on from there. `declined` is
    what the last change wanted and could not be had, why, and when (Unix time) that was given up.
    """

    name: str
    run_id: str
    url: str
    registry: str
    backend: str
    model: str
    roles: dict[str, int]
    created_at: float
    seats: list[SeatRecord]
    phase: Phase = "starting"
    reason: str = ""
    ready_once: bool = False
    head: str = ""
    controller: ControllerRecord = msgspec.field(default_factory=ControllerRecord)
    changing: str = ""
    retired: dict[str, int] = {}
    locked: LockRecord | None = None
    planner: str = ""
    declined: str = ""
    declined_at: float = 0.0
    version: int = STATE_VERSION

    def seat(self, seat_id: str) -> SeatRecord | None:
        """The seat of that id."""
        return next((s for s in self.seats if s.id == seat_id), None)


def drain_of(state: RunState | None) -> float:
    """How long requests may take to end when nobody says otherwise, in seconds."""
    return max((seat.drain_timeout_s for seat in state.seats), default=0.0) if state else 30.0


def stop_margin_of(state: RunState | None) -> float:
    """How long the slowest engine may take to exit once its requests are done, and its sidecar after it."""
    slowest = max((seat.stop_timeout_s for seat in state.seats), default=0.0) if state else 0.0
    return max(LEAST_STOP_MARGIN_S, slowest + _SIDECAR_S)


def encode_state(state: RunState) -> bytes:
    """The stored form: JSON for people too."""
    return msgspec.json.format(msgspec.json.encode(state), indent=1)


def save_state(path: Path, state: RunState) -> None:
    """Write it whole or not at all. Raises OSError."""
    write_atomic(path, encode_state(state))


def load_state(path: Path) -> RunState | None:
    """What is on disk; None when nothing is. Raises CodecError for what cannot be read."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CodecError(f"the state cannot be read: {error.strerror}", where=str(path)) from error
    try:
        state = msgspec.json.decode(raw, type=RunState)
    except msgspec.MsgspecError as error:
        raise CodecError(f"not a state: {error}", where=str(path)) from error
    if state.version != STATE_VERSION:
        raise CodecError(f"state version {state.version} is not {STATE_VERSION}", where=str(path))
    return state


def readable_state(path: Path) -> RunState | None:
    """What is on disk; None when there is nothing that can be read: what lives can be ended all the same."""
    try:
        return load_state(path)
    except CodecError as error:
        logger.warning("state.unreadable error=%s", error)
        return None
