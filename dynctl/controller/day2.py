"""The controller's answers to the verbs that change a deployment while it runs.

The plan is on disk before the state is, and the state before anything is done: whoever takes over brings the
seats in line with the plan again (`deploy.reseat`) and goes on from there.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from dynctl.controller.claims import Claims
from dynctl.controller.rolling import changing
from dynctl.deploy.audit import audit
from dynctl.deploy.beside import EXEC_MOST_S, beside
from dynctl.deploy.claim import same_text
from dynctl.deploy.digest import plan_digest
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.records import SEAT_KINDS
from dynctl.deploy.reseat import reseat
from dynctl.deploy.state import LockRecord, RunState
from dynctl.deploy.status import lock_words
from dynctl.errors import DynctlError, LaunchError, UsageError
from dynctl.launchers.files import write_atomic
from dynctl.launchers.fleet import Fleet
from dynctl.protocol.day2 import Actor, ApplyCall, Done, DrainCall, ExecCall, ExecReply, LockCall
from dynctl.transport.control import read_body

logger = logging.getLogger(__name__)

OPS = ("controller.apply", "controller.drain", "controller.lock", "controller.exec")
_FORMER = re.compile(r"recipe\.lock\.(\d+)\.yaml")


@dataclass(frozen=True, slots=True)
class Desk:
    """What the verbs work on. `changed` is called when the state has been changed, to act on it."""

    run: RunDir
    state: RunState
    fleet: Fleet
    claims: Claims
    changed: Callable[[], None]


class Day2:
    """Keeps `plan`, which is what is on disk, and changes it on demand."""

    def __init__(self, desk: Desk, plan: Plan) -> None:
        self.plan = plan
        self._desk = desk
        reseat(desk.state, plan)

    async def handle(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        """Answer one call of `OPS`, with a line in the audit. Raises UsageError, LaunchError, CodecError."""
        kinds: dict[str, type[ApplyCall | DrainCall | LockCall | ExecCall]] = {
            "controller.apply": ApplyCall,
            "controller.drain": DrainCall,
            "controller.lock": LockCall,
            "controller.exec": ExecCall,
        }
        call = read_body(body, kinds[op])
        try:
            self._require_unlocked(call)
            answer = await self._exec(call) if isinstance(call, ExecCall) else await self._change(call)
        except DynctlError as error:
            self._audit(call.actor, f"refused: {error.message}")
            raise
        self._audit(call.actor, f"exit {answer.code}" if isinstance(answer, ExecReply) else "done")
        return answer

    def prune(self) -> None:
        """Take out of the plan on disk what has left the deployment: it stood in for others."""
        seats = {seat.id for seat in self._desk.state.seats}
        gone = {p.id for p in self.plan.processes if p.kind in SEAT_KINDS and p.id not in seats}
        if not gone:
            return
        left = tuple(p for p in self.plan.processes if p.id not in gone and _sidecar(p.id) not in gone)
        plan = replace(self.plan, processes=left)
        run = self._desk.run
        try:
            write_atomic(run.plan, plan.to_json())
        except OSError as error:
            # What has left is not started again; the file is written with the next change.
            logger.error("plan.unwritable error=%s", error)
        self.plan = plan

    def take(self, plan: Plan) -> bool:
        """Go by this plan from now on; whether it could be written down."""
        run = self._desk.run
        try:
            write_atomic(run.plan, plan.to_json())
        except OSError as error:
            logger.error("plan.unwritable error=%s", error)
            return False
        self.plan = plan
        reseat(self._desk.state, plan)
        return True

    async def _change(self, call: ApplyCall | DrainCall | LockCall) -> Done:
        match call:
            case ApplyCall():
                await self._apply(call)
            case DrainCall():
                self._drain(call)
            case LockCall():
                self._lock(call)
        self._desk.changed()
        return Done(changing=changing(self._desk.state))

    def _require_unlocked(self, call: ApplyCall | DrainCall | LockCall | ExecCall) -> None:
        state, where = self._desk.state, str(self._desk.run.path)
        if state.phase == "stopping":
            raise UsageError(f"'{state.name}' is stopping", where=where)
        frees = isinstance(call, LockCall) and not call.message
        if state.locked is not None and not (call.actor.force or frees):
            raise UsageError(
                f"'{state.name}' is locked by {lock_words(state.locked)}",
                where=where,
                hint="dynctl unlock, or --force",
            )

    async def _apply(self, call: ApplyCall) -> None:
        plan = Plan.from_json(call.plan)
        self._require_base(call, plan)
        async with self._desk.claims.growing(self.plan, plan):
            self._require_base(
                call, plan
            )  # others may have changed it, or ended all, while GPUs were claimed
            self._require_unlocked(call)
            self._write(call, plan)
            self.plan = plan
            state = self._desk.state
            state.declined, state.declined_at = call.declined, time.time() if call.declined else 0.0
            reseat(state, plan, call.restart)

    def _require_base(self, call: ApplyCall, plan: Plan) -> None:
        run, state = self._desk.run, self._desk.state
        if call.base != plan_digest(self.plan):
            raise UsageError(f"'{state.name}' has changed meanwhile", where=str(run.path), hint="try again")
        if (plan.run_id, plan.registry, plan.membership) != (
            self.plan.run_id,
            self.plan.registry,
            self.plan.membership,
        ):
            raise UsageError("that is the plan of another run", where=plan.run_id)

    def _write(self, call: ApplyCall, plan: Plan) -> None:
        run = self._desk.run
        try:
            former = run.lock.read_text()
            if not same_text(former, call.lock):
                write_atomic(run.path / next_former(run), former)
            write_atomic(run.plan, plan.to_json())
            write_atomic(run.lock, call.lock)
        except OSError as error:
            message = f"the run directory cannot be written: {error.strerror}"
            raise LaunchError(message, where=str(run.path)) from error

    def _drain(self, call: DrainCall) -> None:
        for seat_id in call.seats:
            seat = self._desk.state.seat(seat_id)
            if seat is None or seat.asked == "leave":
                continue
            if not call.back:
                seat.asked, seat.drain_limit_s = "drain", call.limit_s
            elif seat.asked == "drain":
                seat.asked = "" if seat.state == "ready" else "restart"

    def _lock(self, call: LockCall) -> None:
        who = call.actor
        self._desk.state.locked = (
            LockRecord(message=call.message, user=who.user, host=who.host, at=time.time())
            if call.message
            else None
        )

    async def _exec(self, call: ExecCall) -> ExecReply:
        seat = self._desk.state.seat(call.seat)
        if seat is None:
            raise UsageError(f"no process '{call.seat}'")
        launch = beside(self.plan, call.seat, call.argv)
        return await self._desk.fleet.exec(launch, min(call.timeout_s, EXEC_MOST_S))

    def _audit(self, who: Actor, outcome: str) -> None:
        logger.info("%s by=%s@%s args=%s outcome=%s", who.verb, who.user, who.host, who.args, outcome)
        try:
            audit(self._desk.run, who, outcome)
        except OSError as error:
            # It is in the log; a full disk must not keep anybody from changing what runs.
            logger.error("audit.unwritable error=%s", error)


def next_former(run: RunDir) -> str:
    """The name that the recipe of now gets when another takes its place: the highest number is the latest."""
    found = (_FORMER.fullmatch(path.name) for path in run.path.iterdir())
    return f"recipe.lock.{max((int(m[1]) for m in found if m), default=0) + 1}.yaml"


def _sidecar(process_id: str) -> str:
    """decode-0.1 of decode-0/engine.1."""
    return process_id.replace("/engine", "")
