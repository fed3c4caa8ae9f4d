"""The planner's clock, sockets and hands around `planner.core`, which decides.

Every load interval the frontends are asked for their figures, what is decided is written down, and what is to
be changed is asked of this controller as `dynctl scale` asks it. The recipe is read again whenever it has
changed. Whatever goes wrong is told, and tried again at the next tick.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from dynctl.controller.amending import scale, words
from dynctl.controller.planner_watch import LOOK_S, Note, has_section
from dynctl.controller.rolling import Unit, units_of
from dynctl.deploy.amend import hosts_of, read_plan
from dynctl.deploy.figures import Look
from dynctl.deploy.home import RunDir
from dynctl.deploy.scrape import look
from dynctl.deploy.state import RunState
from dynctl.errors import DynctlError
from dynctl.planner.config import PlannerConfig
from dynctl.planner.core import Decision, decide, refused
from dynctl.planner.figures import Seats, observation
from dynctl.planner.journal import Entry, append, read
from dynctl.planner.memory import PlannerState
from dynctl.planner.observe import Observation, RoleLoad
from dynctl.planner.settings import config_of
from dynctl.protocol.instances import Role
from dynctl.protocol.planner import PlannerFigures
from dynctl.recipe.load import load_recipe

logger = logging.getLogger(__name__)

_OLD = 10
"""Intervals after which the demand of before a restart says nothing any more."""


@dataclass(frozen=True, slots=True)
class PlanDesk:
    """What the planner works on. `note` writes an event; `tell` hands figures to the frontends."""

    run: RunDir
    state: RunState
    note: Note
    tell: Callable[[PlannerFigures], None]


@dataclass(slots=True)
class _Rules:
    """The recipe's, as of `stamp`; `config` None: there is no planner."""

    stamp: tuple[int, int] = (0, 0)
    config: PlannerConfig | None = None
    fault: str = ""


@dataclass(slots=True)
class _Told:
    """What has been told last, so that only changes are told."""

    news: tuple[str, dict[Role, tuple[str, int]]] = ("", {})
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    last: str = ""
    declined_at: float = 0.0


class Planning:
    """One controller's planner: `run` until cancelled."""

    def __init__(self, desk: PlanDesk) -> None:
        self._desk = desk
        self._rules = _Rules()
        self._memory: PlannerState | None = None
        self._before: Look | None = None
        self._told = _Told()

    async def run(self) -> None:
        """Tick for ever."""
        while True:
            config = await self._configured()
            if config is None or self._desk.state.phase not in ("ready", "degraded"):
                self._before = None
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self._tick(config)
            except Exception as error:
                # The top of a task: a tick that breaks is one decision less, not the end of them.
                logger.exception("planner.tick_failed")
                self._desk.state.planner = f"its last look failed: {type(error).__name__}: {error}"
            await asyncio.sleep(config.load_interval_s)

    async def _configured(self) -> PlannerConfig | None:
        """The rules of the recipe as it is now."""
        desk, stamp = self._desk, _stamp(self._desk.run)
        if stamp != self._rules.stamp:
            before, self._rules = self._rules.config, await asyncio.to_thread(_read, desk.run, stamp)
            config, fault = self._rules.config, self._rules.fault
            if fault:
                desk.note("planner.off", {"message": fault})
                desk.state.planner = f"off: {fault}"
            elif config is None:
                desk.state.planner = ""
            elif config != before:
                desk.state.planner = "looking"
            if config is not None and self._memory is None:
                self._memory = await asyncio.to_thread(_remembered, desk.run, config)
        return self._rules.config

    async def _tick(self, config: PlannerConfig) -> None:
        seen = await self._observe(config)
        memory = self._memory
        if seen is None or memory is None:
            return
        now = time.monotonic()
        decision = decide(memory, seen, config, now)
        outcome = await self._act(decision, config, now) if decision.changed else ""
        over = memory.past[-1] if memory.window.span_s == 0.0 else None
        news = (outcome, {role: (one.code, one.target) for role, one in decision.roles.items()})
        fresh = news != self._told.news
        self._tell(config, decision, seen, outcome if fresh else "")
        if over is not None or fresh:
            entry = Entry(
                ts=round(time.time(), 3),
                decision=decision,
                observation=seen,
                interval=over,
                outcome=outcome,
                boot_s=round(memory.boot_s, 3),
            )
            await asyncio.to_thread(_write, self._desk.run, entry)
        self._told.news = news

    async def _observe(self, config: PlannerConfig) -> Observation | None:
        """What happened since the last tick; None at the first, and while no frontend answers.

        A frontend that does not answer counts as it was: what it missed is in its next answer.
        """
        state, before = self._desk.state, self._before
        doors = {
            f"{seat.id}.{seat.incarnation}": seat.url
            for seat in state.seats
            if seat.kind == "frontend" and seat.pid and seat.url
        }
        after = await asyncio.to_thread(look, doors)
        if not after.series:
            if doors:
                state.planner = "no frontend tells its figures"
            return None
        silent = {one: told for one, told in (before.series if before else {}).items() if one in doors}
        self._before = Look(after.at, {**silent, **after.series})
        if before is None:
            return None
        return observation(before, self._before, seats_of(state, config), config.sla.percentile)

    async def _act(self, decision: Decision, config: PlannerConfig, now: float) -> str:
        """Have it done; what became of it, in words."""
        if config.advisory:
            return "advisory: nothing was done"
        changes = _changes(decision)
        grows = any(one.target > one.current for one in decision.roles.values())
        declined, at = self._desk.state.declined, self._desk.state.declined_at
        if declined and grows and at != self._told.declined_at:
            assert self._memory is not None
            self._told.declined_at = at
            refused(self._memory, config, decision, now, declined)
            return f"refused: {declined}"
        try:
            turned = await asyncio.to_thread(scale, self._desk.run, changes)
        except DynctlError as error:
            assert self._memory is not None
            refused(self._memory, config, decision, now, error.message)
            self._desk.note("planner.refused", {"wanted": words(changes), "message": str(error)})
            return f"refused: {error.message}"
        self._desk.note("planner.scaled", {"to": words(changes), "reason": decision.reason})
        return f"done: {'; '.join(turned)}" if turned else "done"

    def _tell(self, config: PlannerConfig, decision: Decision, seen: Observation, outcome: str) -> None:
        """`outcome`: "" for advice that is as it was, too: that is told once."""
        if outcome:
            self._told.last = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {decision.reason}, {outcome}"
        if config.advisory and outcome:
            told: dict[str, str | int | float] = {"to": words(_changes(decision))}
            self._desk.note("planner.advised", {**told, "reason": decision.reason})
        if config.advisory:
            last = f"advice of {self._told.last}" if decision.changed else "no change is advised"
        else:
            last = f"last change {self._told.last}" if self._told.last else "nothing changed yet"
        self._desk.state.planner = ", ".join(
            (
                *(["advisory"] if config.advisory else []),
                *(f"{role} {one.ready}/{one.wanted}" for role, one in seen.roles.items()),
                last,
            )
        )
        for role, one in decision.roles.items():
            if outcome or one.code == "hold":
                self._told.counts[role, one.code] += 1
        self._desk.tell(figures_of(decision, seen, self._told.counts))


def seats_of(state: RunState, config: PlannerConfig) -> dict[Role, Seats]:
    """The replicas of each role that is planned for."""
    units = [unit for unit in units_of(state) if not unit.surge]
    return {role: _seats(state, role, [unit for unit in units if unit.role == role]) for role in config.roles}


def _seats(state: RunState, role: Role, units: list[Unit]) -> Seats:
    ready = [unit for unit in units if unit.ready and not unit.leaving and not unit.held]
    load = RoleLoad(
        wanted=state.roles[role],
        ready=len(ready),
        starting=sum(_starting(unit) for unit in units),
        draining=sum(unit.leaving for unit in units),
        failed=sum(_failed(unit) for unit in units),
    )
    return Seats(load, tuple(unit.seats[0].id for unit in ready))


def _starting(unit: Unit) -> bool:
    """On its way for the first time, or again and soon there: not who keeps failing after it has served."""
    if unit.leaving or unit.held or unit.ready or any(seat.state == "failed" for seat in unit.seats):
        return False
    return unit.fresh or any(
        seat.state == "starting" or (seat.state == "backoff" and not seat.ever_ready) for seat in unit.seats
    )


def _failed(unit: Unit) -> bool:
    """Given up before it has ever served."""
    given_up = any(seat.state == "failed" for seat in unit.seats)
    return given_up and not unit.leaving and not all(seat.ever_ready for seat in unit.seats)


def _changes(decision: Decision) -> dict[str, int]:
    return {role: one.target for role, one in decision.roles.items() if one.target != one.current}


def figures_of(decision: Decision, seen: Observation, counts: Counter[tuple[str, str]]) -> PlannerFigures:
    """What metrics show of a tick."""
    by_role = decision.roles.items()
    gauges: dict[str, dict[str, float]] = {
        "planner_target_replicas": {role: float(one.target) for role, one in by_role},
        "planner_floor_replicas": {role: float(one.floor) for role, one in by_role if one.floor is not None},
        "planner_ready_replicas": {role: float(one.ready) for role, one in seen.roles.items()},
        "planner_observed_requests_per_second": {"": seen.arrivals / seen.span_s},
    }
    if decision.ahead is not None:
        gauges["planner_predicted_requests_per_second"] = {"": decision.ahead.rate}
        gauges["planner_predicted_input_tokens"] = {"": decision.ahead.isl}
        gauges["planner_predicted_output_tokens"] = {"": decision.ahead.osl}
    return PlannerFigures(gauges=gauges, decisions=[(role, code, n) for (role, code), n in counts.items()])


def _stamp(run: RunDir) -> tuple[int, int]:
    try:
        found = run.lock.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino


def _read(run: RunDir, stamp: tuple[int, int]) -> _Rules:
    """The rules in the run's recipe."""
    try:
        if not has_section(run):
            return _Rules(stamp)  # most have none: nothing is parsed for it
        loaded = load_recipe(run.lock, (), (), files_here=False)
        if loaded.recipe.planner is None or not loaded.recipe.planner.enabled:
            return _Rules(stamp)
        gpus = sum(host.gpus or 0 for host in hosts_of(run, read_plan(run)).hosts)
        return _Rules(stamp, config_of(loaded, gpus))
    except OSError as error:
        return _Rules(stamp, fault=f"{run.lock} cannot be read: {error.strerror}")
    except DynctlError as error:
        return _Rules(stamp, fault=str(error))


def _remembered(run: RunDir, config: PlannerConfig) -> PlannerState:
    """Demand as the controller before this one saw it, if that is not long ago."""
    memory = PlannerState()
    try:
        entries = read(run.planner)
    except OSError as error:
        logger.error("planner.journal_unreadable error=%s", error)
        return memory
    if entries and time.time() - entries[-1].ts <= max(_OLD * config.interval_s, config.season_s):
        memory.past.extend(entry.interval for entry in entries if entry.interval is not None)
        memory.boot_s = entries[-1].boot_s
    return memory


def _write(run: RunDir, entry: Entry) -> None:
    try:
        append(run.planner, entry)
    except OSError as error:
        # A full disk must not keep the planner from its work; the log says what was decided.
        logger.error("planner.unwritable error=%s", error)
