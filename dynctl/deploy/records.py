"""What a run's state begins with, from its plan. Pure."""

from __future__ import annotations

import msgspec

from dynctl.deploy.digest import digest_of
from dynctl.deploy.plan import Plan, PlannedProcess
from dynctl.deploy.state import (
    RunState,
    SeatKind,
    SeatRecord,
)
from dynctl.deploy.stop import CONTROLLER

_START_S = 60.0
"""For a process without an engine to register, unless its spec says otherwise."""


SEAT_KINDS: dict[str, SeatKind] = {"worker": "worker", "frontend": "frontend"}
"""Kinds of planned processes that the controller looks after."""


def initial_state(plan: Plan, now: float) -> RunState:
    """The state of a run of which nothing has been started."""
    return RunState(
        name=plan.name,
        run_id=plan.run_id,
        url=plan.url,
        registry=plan.registry,
        backend=plan.backend,
        model=plan.model,
        roles=dict(plan.roles),
        created_at=now,
        head=plan.process(CONTROLLER).node,
        seats=[seat_record(p, SEAT_KINDS[p.kind]) for p in plan.processes if p.kind in SEAT_KINDS],
    )


class _SpecHead(msgspec.Struct):
    """What the state needs of a process's spec."""

    start_timeout_s: float = _START_S
    sync_timeout_s: float = 0.0
    drain_timeout_s: float = 30.0
    stop_timeout_s: float = 0.0
    follower: bool = False


def seat_record(process: PlannedProcess, kind: SeatKind) -> SeatRecord:
    """A seat of which nothing has been started."""
    text = process.command.files.get(f"specs/{process.id}.json", "{}")
    spec = msgspec.json.decode(text, type=_SpecHead)
    return SeatRecord(
        id=process.id,
        kind=kind,
        role=process.role,
        index=process.index,
        node=process.node,
        start_timeout_s=spec.start_timeout_s + spec.sync_timeout_s,
        drain_timeout_s=spec.drain_timeout_s,
        stop_timeout_s=spec.stop_timeout_s,
        follower=spec.follower,
        gpus=list(process.gpus),
        digest=digest_of(process),
        takes=process.takes,
    )
