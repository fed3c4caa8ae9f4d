"""How many replicas of each role there are to be: one observation after another in, decisions out. Pure.

Two loops. Once an interval *throughput* forecasts demand (rate of arrivals, lengths) for as long as a replica
takes to boot, and one interval more, and asks the queueing model how many replicas that takes: the floor. At
every tick *load* looks at each worker: when all of them have been beyond the service level for three ticks,
as many more as bear what comes and what waits; fewer when those left would take over with room to spare. With
both, load works above the floor. Growth acts at once; nothing is taken away before a cool-down in which it
was never needed.

`decide` reads no clock and does nothing but change `state`; whoever calls it acts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from dynctl.planner.budget import share, within
from dynctl.planner.capacity import Costs, Forecast
from dynctl.planner.config import PlannerConfig
from dynctl.planner.load import Pressure, backlog, pressure
from dynctl.planner.memory import PlannerState, RoleState, costs_of, forecast_of, take
from dynctl.planner.observe import Observation, RoleLoad
from dynctl.protocol.instances import Role

_PRESSED_TICKS = 3
_LESS_RATE = 0.85
"""Where load has asked for one more, it is taken away again once demand is below so much of what it was."""
_BEYOND = 4
"""So many times the maximum is told of what demand takes."""
_UNEVEN = 1.15
"""So much more demand where one worker does both: a prompt that is read in between makes the gaps of short
answers longer than the model's, which knows the mean answer only (measured: docs/profiling.md)."""
_WORTH = 1.1
"""Beyond the budget, shares are changed only when whoever is worst off gets so much more."""


class RoleDecision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one role is to be. `current`: replicas wanted now; `floor`: what demand takes (None: not known).

    `code`: one of hold, up, down, undo; `why` in words.
    """

    current: int
    target: int
    code: str
    why: str
    floor: int | None = None


class Ahead(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The demand planned for: the most within `horizon_s`; `now`: the rate of the last interval."""

    rate: float
    isl: float
    osl: float
    hit_rate: float
    horizon_s: float
    now: float


class Decision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What there is to be, by role, and why. `at`: the caller's clock. `by`: what costs are known from."""

    at: float
    roles: Mapping[Role, RoleDecision]
    ahead: Ahead | None = None
    by: Mapping[Role, str] = {}

    @property
    def targets(self) -> dict[Role, int]:
        """Replicas by role."""
        return {role: one.target for role, one in self.roles.items()}

    @property
    def changed(self) -> bool:
        """Whether there is anything to do."""
        return any(one.target != one.current for one in self.roles.values())

    @property
    def reason(self) -> str:
        """All of it in one line."""
        return "; ".join(
            f"{role} {one.current}"
            + (f" -> {one.target}" if one.target != one.current else "")
            + f": {one.why}"
            for role, one in self.roles.items()
        )


def decide(state: PlannerState, seen: Observation, config: PlannerConfig, now: float) -> Decision:
    """One tick. `now` in seconds on any clock that does not go back; `seen` covers the time since the last.

    Targets are within each role's minimum and maximum, and within the GPU budget as far as the minima are;
    but for a while after it was refused (`refused`), when a role is left as it is. Advice (`config.advisory`)
    changes nothing: it stands until replicas or demand change.
    """
    state.begin(config, now)
    due = take(state, seen, config, now)
    costs, sources = costs_of(state, config)
    ahead = forecast_of(state, config)
    if due and ahead is not None:
        _set_floors(state, config, costs, ahead)
    made = {role: _one(state, seen, config, (role, costs, now)) for role in config.roles}
    bounded = {role: _tried(one, state.roles[role], now) for role, one in _bounded(config, made).items()}
    if not config.advisory:
        for role, one in bounded.items():
            state.roles[role].settle(one.current, one.target, now)
        moved = any(one.target < one.current for one in bounded.values())
        for role, one in bounded.items():
            if one.target > one.current:
                state.roles[role].moved = moved
    return Decision(at=now, roles=bounded, ahead=_told(state, config, ahead), by=sources)


def refused(state: PlannerState, config: PlannerConfig, decision: Decision, now: float, why: str) -> None:
    """What was decided could not be done: growth of those roles waits, twice as long at each further time."""
    for role, one in decision.roles.items():
        if one.target != one.current:
            state.roles[role].refuse(one.current, _code(one.current, one.target), (now, why, config.retry_s))


def _set_floors(state: PlannerState, config: PlannerConfig, costs: Costs, ahead: Forecast) -> None:
    """How many replicas demand takes, and how many more of it those would have to bear to be too few."""
    for role, bounds in config.roles.items():
        more = (1.0 + config.headroom) * (_UNEVEN if role == "aggregated" else 1.0)
        wanted = replace(ahead, rate=ahead.rate * more)
        ample = replace(wanted, rate=wanted.rate * (1.0 + config.slack))
        if role not in costs.profiles:
            state.roles[role].floor = state.roles[role].ample = None
            continue
        most = _BEYOND * bounds.maximum
        state.roles[role].floor = costs.replicas(role, wanted, most)
        state.roles[role].ample = costs.replicas(role, ample, most)


def _one(
    state: PlannerState, seen: Observation, config: PlannerConfig, about: tuple[Role, Costs, float]
) -> RoleDecision:
    """One role on its own: before the budget is looked at."""
    role, _, now = about
    own, load, bounds = state.roles[role], seen.roles[role], config.roles[role]
    own.look(load, now, config)
    floor = own.floor if config.mode != "load" else None
    push = _pushed(state, seen, config, about)
    fewest = max(push.fewest, own.ample or 1) if floor is not None else push.fewest
    own.needed(fewest, now, config.cooldown_s)
    told = RoleDecision(current=load.wanted, target=load.wanted, code="hold", why="", floor=floor)
    gone_wrong = own.gone_wrong(load, now, config)
    if gone_wrong:
        back = min(max(bounds.minimum, load.ready), bounds.maximum)
        own.refuse(load.wanted, "up", (now, gone_wrong, config.retry_s))
        return _made(told, back, "undo", f"{gone_wrong}: undone")
    if load.wanted < bounds.minimum or load.wanted > bounds.maximum:
        target = min(max(load.wanted, bounds.minimum), bounds.maximum)
        return _made(told, target, "up" if target > load.wanted else "down", "to its minimum and maximum")
    if max(push.target, floor or 0) > load.wanted:
        return _grown(told, push, bounds.maximum)
    return _shrunk(told, own, load, (config, bounds.minimum, now), push.why)


@dataclass(frozen=True, slots=True)
class _Push:
    """What load says. `target`: as many as it asks for, 0 = no more than there are; `why`: who is beyond the
    service level, also when it is not for long enough yet. `fewest`: so many would do.
    """

    target: int
    why: str
    fewest: int


def _pushed(
    state: PlannerState, seen: Observation, config: PlannerConfig, about: tuple[Role, Costs, float]
) -> _Push:
    """Load asks for more once all workers have been beyond the service level for some ticks, and nothing is
    under way.
    """
    role, costs, _ = about
    own, load = state.roles[role], seen.roles[role]
    if config.mode == "throughput":
        return _Push(0, "", own.ample or load.wanted)
    usual = state.usual()
    found = pressure(role, seen, costs.profiles.get(role), config.sla, usual)
    own.over_ticks = own.over_ticks + 1 if found.over else 0
    fewest, target = found.fewest, 0
    if config.mode == "load" or own.floor is None:
        fewest = max(fewest, load.ready - 1)  # without a forecast one at a time
    rate = usual.rate if usual else 0.0
    if own.over_ticks >= _PRESSED_TICKS and not (load.starting or load.draining):
        own.pressed = (load.wanted, rate)
        target = max(load.wanted + 1, _borne(state, seen, config, about, found))
    elif own.pressed is not None and rate >= _LESS_RATE * own.pressed[1]:
        fewest = max(fewest, own.pressed[0] + 1)
    else:
        own.pressed = None
    return _Push(target, found.why, fewest)


def _borne(
    state: PlannerState,
    seen: Observation,
    config: PlannerConfig,
    about: tuple[Role, Costs, float],
    found: Pressure,
) -> int:
    """How many replicas bear what comes and work off, within an interval, what waits, and what will until
    they serve. Where costs are not known: twice as many once users get twice the service level.
    """
    role, costs, _ = about
    usual, load, most = state.usual(), seen.roles[role], config.roles[role].maximum
    if role not in costs.profiles or usual is None:
        return min(most, load.ready * (2 if found.far else 1))
    rate = max(usual.rate, state.rate_now())
    short = max(0.0, rate - load.ready * costs.most_rate(role, usual))
    waits = backlog(role, seen, costs, usual) + short * state.boot_s
    return costs.replicas(role, replace(usual, rate=rate + waits / config.interval_s), most)


def _grown(told: RoleDecision, push: _Push, maximum: int) -> RoleDecision:
    """To what the loop asks for that asks for more, for its reason."""
    floor = told.floor or 0
    wanted, why = (push.target, push.why) if push.target > floor else (floor, f"demand takes {floor}")
    if min(wanted, maximum) <= told.current:
        return _made(told, told.current, "hold", f"{why}, but {maximum} is its maximum")
    return _made(told, min(wanted, maximum), "up", why)


def _shrunk(
    told: RoleDecision, own: RoleState, load: RoleLoad, at: tuple[PlannerConfig, int, float], pressed: str
) -> RoleDecision:
    config, minimum, now = at
    if load.starting or load.draining:
        moving = f"{load.starting} starting" if load.starting else f"{load.draining} draining"
        return _made(told, told.current, "hold", f"a change is under way: {moving}")
    if pressed:
        return _made(told, told.current, "hold", f"{pressed}: for less than {_PRESSED_TICKS} looks so far")
    target = max(own.most_needed(), minimum)
    if target >= told.current:
        return _made(told, told.current, "hold", _enough(told))
    wait_s = own.quiet_since + config.cooldown_s - now
    if wait_s > 0.0:
        why = f"{target} would do, but only after {math.ceil(wait_s)} s more of it (cool-down)"
        return _made(told, told.current, "hold", why)
    return _made(told, target, "down", f"{target} have been enough for {config.cooldown_s:g} s")


def _enough(told: RoleDecision) -> str:
    if told.floor is None:
        return "neither too many nor too few"
    return f"demand takes {told.floor}"


def _made(told: RoleDecision, target: int, code: str, why: str) -> RoleDecision:
    return msgspec.structs.replace(told, target=target, code=code, why=why)


def _tried(one: RoleDecision, own: RoleState, now: float) -> RoleDecision:
    """What did not succeed of late is not tried again yet."""
    block = "" if one.code == "undo" else own.block(_code(one.current, one.target), now)
    return _made(one, one.current, "hold", f"{one.why}, but {block}") if block else one


def _bounded(config: PlannerConfig, made: dict[Role, RoleDecision]) -> dict[Role, RoleDecision]:
    """Within minima, maxima and the budget."""
    bounds, gpus = config.roles, {role: one.gpus for role, one in config.roles.items()}
    needs = {role: one.target for role, one in made.items()}
    least = {role: bounds[role].minimum for role in made}
    given = within(needs, least, gpus, config.gpus)
    current = {role: one.current for role, one in made.items()}
    if given != needs and _as_good(current, needs, given, config):
        given = current
    told = {}
    for role, one in made.items():
        target = given[role]
        if target != needs[role]:
            one = _made(
                one, target, _code(one.current, target), f"{one.why}; {config.gpus} GPUs allow {target}"
            )
        told[role] = one
    return told


def _as_good(
    current: dict[Role, int], needs: dict[Role, int], given: dict[Role, int], config: PlannerConfig
) -> bool:
    """Whether the replicas there are now are within bounds and about as good: then nothing is moved."""
    bounds = config.roles
    if any(not bounds[role].minimum <= count <= bounds[role].maximum for role, count in current.items()):
        return False
    used, grows = _used(current, config), any(given[role] > current[role] for role in given)
    if used > config.gpus or (grows and used < _used(given, config)):
        return False
    return share(given, needs) < _WORTH * share(current, needs)


def _used(given: dict[Role, int], config: PlannerConfig) -> int:
    return sum(count * config.roles[role].gpus for role, count in given.items())


def _code(current: int, target: int) -> str:
    return "up" if target > current else "down" if target < current else "hold"


def _told(state: PlannerState, config: PlannerConfig, ahead: Forecast | None) -> Ahead | None:
    if ahead is None:
        return None
    return Ahead(
        rate=ahead.rate,
        isl=ahead.isl,
        osl=ahead.osl,
        hit_rate=ahead.hit_rate,
        horizon_s=state.boot_s + config.interval_s,
        now=state.past[-1].rate if state.past else 0.0,
    )
