"""The supervisor's vocabulary: what it is told (events) and what it orders (instructions)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dynctl.errors import LaunchError
from dynctl.protocol.exits import LastWords
from dynctl.protocol.registry import InstanceState


@dataclass(frozen=True, slots=True)
class Begin:
    """A controller takes over. `alive`: seats whose recorded process lives."""

    alive: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Started:
    """A process runs. `wall_s` is Unix time."""

    id: str
    incarnation: int
    pid: int
    start_ticks: int
    pgid: int
    wall_s: float


@dataclass(frozen=True, slots=True)
class StartFailed:
    """There is no process. `permanent`: trying again is useless; `kind` of the error."""

    id: str
    incarnation: int
    message: str
    permanent: bool
    kind: str = LaunchError.kind


@dataclass(frozen=True, slots=True)
class Seen:
    """It has registered, or renewed with another state."""

    id: str
    incarnation: int
    state: InstanceState
    url: str
    engine_pid: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Its lease ran out or was given back."""

    id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node does not answer: what is in its seats may live on, unseen."""

    node: str
    why: str


@dataclass(frozen=True, slots=True)
class Moved:
    """Seats that were on a lost node are to be started on others. `nodes`: where, by seat."""

    nodes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NodeBack:
    """It answers again."""

    node: str


@dataclass(frozen=True, slots=True)
class Exited:
    """It has ended. `code` None: unknown. `lines`: the end of its log, for want of last words."""

    id: str
    incarnation: int
    code: int | None
    words: LastWords | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HandoverFailed:
    """A sidecar was asked to become another seat's and will not, or did not answer."""

    id: str
    incarnation: int
    message: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Stop:
    """End everything: requests have `drain_s` to end, 0 = kill at once. `failure`: what it is ended for."""

    drain_s: float
    failure: str = ""


Event = (
    Begin
    | Started
    | StartFailed
    | Seen
    | Gone
    | NodeLost
    | NodeBack
    | Moved
    | Exited
    | HandoverFailed
    | Tick
    | Stop
)


@dataclass(frozen=True, slots=True)
class Start:
    """Start this incarnation of a seat."""

    id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class HandOver:
    """Ask the sidecar of `id` to drain and become this incarnation of seat `to`, its engine running on."""

    id: str
    to: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGTERM the seat's own process."""

    id: str


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL whatever is left of a seat up to this incarnation, its engine too, and see it gone."""

    id: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Note:
    """Write to the run's events."""

    event: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """All is ended: the controller exits."""


Instruction = Start | HandOver | Terminate | Kill | Note | Finish
