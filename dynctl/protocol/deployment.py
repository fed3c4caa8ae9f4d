"""A deployment as its controller sees it: what "controller.ps", ".status" and ".down" answer."""

from __future__ import annotations

from typing import Literal

import msgspec

Phase = Literal["pending", "starting", "ready", "degraded", "stopping", "stopped", "failed"]
"""pending (its job waits for nodes) → starting → ready ⇄ degraded → stopping → stopped.
failed = it could not start, or was ended for that.
"""

SeatState = Literal[
    "waiting",
    "starting",
    "ready",
    "draining",
    "silent",
    "lost",
    "backoff",
    "stopping",
    "stopped",
    "drained",
    "failed",
]
"""Of one process. `lost`: alive, but its lease ran out; `failed`: given up, it would fail the same again;
`drained`: ended on demand, and kept so.
"""


class ProcessView(msgspec.Struct, frozen=True, kw_only=True):
    """One row of `ps`. `id` is the seat ("decode-0"); `instance` is the name it registers under: the same.

    `pid` is the process dynctl started (the sidecar), `engine_pid` its engine's; 0 = none. `last_exit` says
    how the incarnation before ended, `last_error` holds its error lines.
    """

    id: str
    role: str
    index: int
    instance: str
    node: str
    state: SeatState
    ready: bool
    pid: int
    engine_pid: int
    restarts: int
    url: str
    incarnation: int
    started_at: float = 0.0
    last_exit: str = ""
    last_error: list[str] = []
    gpus: list[int] = []
    surge: bool = False


class DeploymentView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole. `reason` says why it is not ready, `controller_pid` 0 that no controller is alive.

    `changing` says what is being replaced, added or removed; `locked` why nobody may change it; `planner` how
    the planner is ("" = there is none); `declined` what was wanted last and is not to be had, and why. `at`
    is when a controller said so, by its clock; 0 = now. `unseen` are nodes that do not answer it: how, and
    for how long.
    """

    name: str
    run_id: str
    run_dir: str
    url: str
    phase: Phase
    reason: str
    controller_pid: int
    wanted: dict[str, int]
    processes: list[ProcessView]
    changing: str = ""
    locked: str = ""
    at: float = 0.0
    planner: str = ""
    declined: str = ""
    unseen: dict[str, str] = {}


class DownCall(msgspec.Struct, frozen=True, kw_only=True):
    """End the deployment: drain for at most `drain_s`, then kill. Answer: `DownReply`, before it is done."""

    drain_s: float = 30.0


class DownReply(msgspec.Struct, frozen=True, kw_only=True):
    """The controller has begun; it is done when it exits."""

    controller_pid: int
