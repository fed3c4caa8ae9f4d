"""What a run's state means to people and scripts: rows, counts, and the first thing that is wrong. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dynctl.deploy.state import ENDED, LockRecord, RunState, SeatRecord
from dynctl.launchers.last_lines import first_error
from dynctl.protocol.deployment import DeploymentView, ProcessView, SeatState
from dynctl.topology.inventory import is_awaited

IsAlive = Callable[[int, int], bool]
"""(pid, start ticks) → whether exactly this process lives."""

_LETTERS = {"prefill": "P", "decode": "D", "encode": "E"}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The first layer that is not well. `layer` "" = all is well; `seat` is whose log tells more."""

    layer: str = ""
    reason: str = ""
    seat: str = ""
    error: str = ""

    @property
    def ready(self) -> bool:
        """Everything serves: a node that only does not answer the controller ("node") takes nothing away."""
        return self.layer in ("", "node")


def view_of(state: RunState, run_dir: str, is_alive: IsAlive, *, everywhere: bool = False) -> DeploymentView:
    """The deployment as it is, checked against the processes that really live.

    Those on other nodes than the controller's are believed to live as long as it does not say otherwise,
    unless `is_alive` tells of them `everywhere`.
    """
    controller = state.controller
    supervised = bool(controller.pid) and is_alive(controller.pid, controller.start_ticks)
    phase, reason = state.phase, state.reason
    rows = [
        _row(
            seat,
            is_alive if everywhere or state.head in ("", seat.node) else _believed,
            supervised=supervised,
        )
        for seat in state.seats
    ]
    if not supervised and phase not in ENDED:
        living = [row for row in rows if row.pid]
        phase = "degraded" if living else "stopped"
        reason = "its controller is not running" if living else "its processes are gone"
    return DeploymentView(
        name=state.name,
        run_id=state.run_id,
        run_dir=run_dir,
        url=state.url,
        phase=phase,
        reason=reason,
        controller_pid=controller.pid if supervised else 0,
        wanted=dict(state.roles),
        processes=rows,
        changing="" if phase in ENDED else state.changing,
        locked=lock_words(state.locked) if state.locked else "",
        planner=state.planner if supervised else "",
        declined=state.declined,
    )


def _believed(pid: int, start_ticks: int) -> bool:
    return True


def _row(seat: SeatRecord, is_alive: IsAlive, *, supervised: bool) -> ProcessView:
    lives = bool(seat.pid) and is_alive(seat.pid, seat.start_ticks)
    shown: SeatState = seat.state
    if not lives and not supervised and shown != "failed":
        shown = "stopped"
    ready = lives and shown == "ready"
    return ProcessView(
        id=seat.id,
        role=seat.role,
        index=seat.index,
        instance=seat.id,
        node=seat.node,
        state=shown,
        ready=ready,
        pid=seat.pid if lives else 0,
        engine_pid=seat.engine_pid if lives else 0,
        restarts=seat.restarts,
        url=seat.url,
        incarnation=seat.incarnation,
        started_at=seat.started_at,
        last_exit=seat.last_exit,
        last_error=list(seat.last_error),
        gpus=list(seat.gpus),
        surge=seat.surge,
    )


def lock_words(lock: LockRecord) -> str:
    """Who locked a deployment, when and why."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(lock.at))
    return f"{lock.user}@{lock.host}, {at}: {lock.message}"


def ready_counts(view: DeploymentView) -> str:
    """Ready replicas by role in one cell: "2/2P 2/2D" with prefill and decode apart, else "2/2".

    A replica over several nodes counts when all its parts are ready.
    """
    cells = []
    for role, wanted in view.wanted.items():
        rows = [row for row in view.processes if row.role == role]
        unready = {row.index for row in rows if not row.ready}
        ready = len({row.index for row in rows} - unready)
        cells.append(f"{ready}/{wanted}{_LETTERS.get(role, '')}")
    return " ".join(cells)


def diagnose(view: DeploymentView, health: Mapping[str, str]) -> Diagnosis:
    """The first failing layer: controller, workers, frontends, the frontends' own health; last the nodes,
    which may fail to answer the controller while all serves.

    `health` is what each frontend that could be asked says against being ready, by its id; "" = nothing.
    """
    if view.phase in ENDED:
        failed = next((r for r in view.processes if r.state == "failed"), None)
        reason = view.reason or ("it was stopped" if view.phase == "stopped" else "it failed")
        if failed is not None:
            return Diagnosis("deployment", reason, failed.id, first_error(failed.last_error))
        return Diagnosis("deployment", reason)
    if view.phase == "pending":
        return Diagnosis("job", view.reason)
    if view.phase == "starting" and not view.controller_pid:
        return Diagnosis("controller", view.reason or "the controller is starting")
    if not view.controller_pid:
        return Diagnosis("controller", "the controller is not running; traffic goes on", "controller")
    for layer, wanted in (("worker", False), ("frontend", True)):
        unready = [r for r in view.processes if not (r.ready or r.surge or is_awaited(r.node))]
        rows = [r for r in unready if (r.role == "frontend") == wanted]
        if rows:
            worst = min(rows, key=lambda r: _ORDER.get(r.state, 9))
            what = view.unseen.get(worst.node)
            told = _sentence(worst) + (f" ({worst.node}: {what})" if what else "")
            return Diagnosis(layer, told, worst.id, first_error(worst.last_error))
    for seat, reason in health.items():
        if reason:
            return Diagnosis("health", reason, seat)
    if view.phase == "stopping":
        return Diagnosis("deployment", "it is stopping")
    if view.unseen:
        return Diagnosis("node", "; ".join(unseen_lines(view)))
    return Diagnosis()


def unseen_lines(view: DeploymentView) -> list[str]:
    """One line for each node that does not answer the controller."""
    serving = {row.node for row in view.processes if row.ready}
    return [
        f"{node}: {what}" + ("; what serves there goes on" if node in serving else "")
        for node, what in view.unseen.items()
    ]


_ORDER = {"failed": 0, "lost": 1, "silent": 2, "backoff": 3, "draining": 4, "starting": 5}


def _sentence(row: ProcessView) -> str:
    if row.state in ("failed", "backoff") or (row.state == "starting" and row.last_exit):
        doing = {"failed": "gave up", "backoff": "waits to be restarted", "starting": "is starting again"}
        return f"{row.id} {doing[row.state]}: {row.last_exit}"
    if row.state == "drained":
        return f"{row.id} is drained; dynctl undrain {row.id} brings it back"
    return f"{row.id} is {row.state}"
