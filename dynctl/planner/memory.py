"""What the planner remembers between two ticks: demand, what replicas cost, what it did. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from dynctl.perfmodel.profile import Profile
from dynctl.planner.capacity import FIRST_STEPS, Costs, Forecast
from dynctl.planner.config import PlannerConfig
from dynctl.planner.observe import Observation, RoleLoad
from dynctl.planner.predict import predict
from dynctl.planner.regress import Sample, corrected, fit_decode, fit_prefill, profile_of
from dynctl.protocol.instances import Role

_PAST = 2000
_OF_LATE = 10
"""Intervals over which cache hits and the spread of prompts are averaged."""
_LONGEST_RETRY = 16.0
FIRST_LOOKS = 3
"""So many looks tell a rate."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Demand of one interval: arrivals a second, mean lengths."""

    rate: float
    isl: float
    osl: float


@dataclass(slots=True)
class RoleState:
    """Of one role. `floor`, `ample`: replicas that demand takes, and that would bear more of it.

    `quiet_since`: since when nothing has grown. `asked_at`: when growth was asked for that is not there
    yet; `moved`: others left for it, whose engines may go on in it. `pressed`: (replicas, rate) at which
    load asked for one more. `blocked`: up or down → (until when that is not tried again, why).
    """

    target: int = -1
    floor: int | None = None
    ample: int | None = None
    quiet_since: float = 0.0
    asked_at: float | None = None
    moved: bool = False
    blocked: dict[str, tuple[float, str]] = field(default_factory=dict)
    retries: int = 0
    over_ticks: int = 0
    pressed: tuple[int, float] | None = None
    lately: deque[tuple[float, int]] = field(default_factory=deque)

    def look(self, load: RoleLoad, now: float, config: PlannerConfig) -> None:
        """Take over how it is. Whoever changed it by hand is heard: that counts as a change, too."""
        if load.wanted != self.target:
            if load.wanted < self.target:
                self.asked_at = None
            self.target, self.quiet_since = load.wanted, now
        if load.starting:
            self.quiet_since = now
        if self.asked_at is not None and load.ready >= load.wanted:
            self.asked_at, self.retries = None, 0

    def needed(self, replicas: int, now: float, keep_s: float) -> None:
        """So many were needed at this tick; kept for so long."""
        self.lately.append((now, replicas))
        while self.lately[0][0] < now - keep_s:
            self.lately.popleft()

    def most_needed(self) -> int:
        """The most that was needed at any tick of late."""
        return max(replicas for _, replicas in self.lately)

    def gone_wrong(self, load: RoleLoad, now: float, config: PlannerConfig) -> str:
        """Why growth that was asked for is given up; "" = it is not, or there is none."""
        if self.asked_at is None or load.ready >= load.wanted:
            return ""
        if load.failed:
            return "a new replica has failed"
        if now > self.asked_at + config.limit_s:
            return f"a new replica was not ready after {config.limit_s:g} s"
        return ""

    def settle(self, current: int, target: int, now: float) -> None:
        """That is what is asked for now."""
        if target == current:
            return
        self.target, self.over_ticks = target, 0
        self.asked_at = None
        if target > current:
            self.quiet_since = self.asked_at = now
            self.lately.clear()

    def refuse(self, current: int, way: str, about: tuple[float, str, float]) -> None:
        """It could not go `up`, or `down`: not again for a while, twice as long each time.

        `about`: (now, why, seconds to wait at first).
        """
        now, why, retry_s = about
        self.target, self.asked_at = current, None
        self.blocked[way] = (now + retry_s * min(_LONGEST_RETRY, 2.0**self.retries), why)
        self.retries += 1

    def block(self, way: str, now: float) -> str:
        """Why that is not tried now, "" = it may be."""
        until, why = self.blocked.get(way, (now, ""))
        return f"{why}; tried again in {math.ceil(until - now)} s" if until > now else ""


@dataclass(slots=True)
class _Window:
    """The interval that is under way."""

    span_s: float = 0.0
    looks: int = 0
    arrivals: float = 0.0
    prompts: float = 0.0
    answers: float = 0.0
    told_prompts: float = 0.0
    told_answers: float = 0.0


@dataclass(slots=True)
class PlannerState:
    """All of it. A new one is complete; `past` may be filled from a journal or a trace beforehand."""

    past: deque[Interval] = field(default_factory=lambda: deque(maxlen=_PAST))
    roles: dict[Role, RoleState] = field(default_factory=dict)
    boot_s: float = 0.0
    hit_rate: float = 0.0
    isl_cv: float = 0.0
    kv_tokens: int = 0
    prefill: Sample = field(default_factory=lambda: Sample(1))
    decode: Sample = field(default_factory=lambda: Sample(2))
    window: _Window = field(default_factory=_Window)

    def begin(self, config: PlannerConfig, now: float) -> None:
        """Before the first tick."""
        self.boot_s = self.boot_s or config.boot_s
        for role in config.roles:
            self.roles.setdefault(role, RoleState(quiet_since=now))

    def usual(self) -> Forecast | None:
        """Demand of the last interval; None before there was one with known lengths."""
        if not self.past:
            return None
        last = self.past[-1]
        lengths = next(((one.isl, one.osl) for one in reversed(self.past) if one.isl and one.osl), None)
        if lengths is None:
            return None
        return Forecast(last.rate, *lengths, hit_rate=self.hit_rate, isl_cv=self.isl_cv)

    def rate_now(self) -> float:
        """Arrivals a second in the interval under way, once it is some looks long; before, 0."""
        return self.window.arrivals / self.window.span_s if self.window.looks >= FIRST_LOOKS else 0.0


def take(state: PlannerState, seen: Observation, config: PlannerConfig, now: float) -> bool:
    """Add an observation to the interval under way; whether that is over, and the next has begun.

    The very first is over as soon as it tells something where users get worse than the service level: who
    begins with too few must not wait for it.
    """
    window = state.window
    window.span_s += seen.span_s
    window.looks += 1
    window.arrivals += seen.arrivals
    if seen.isl:
        window.prompts += seen.isl * seen.arrivals
        window.told_prompts += seen.arrivals
    if seen.osl:
        window.answers += seen.osl * max(1, seen.arrivals)
        window.told_answers += max(1, seen.arrivals)
    state.kv_tokens = seen.kv_tokens or state.kv_tokens
    _smooth(state, seen)
    if any(one.profile is None or one.profile.source == "estimate" for one in config.roles.values()):
        _learn(state, seen)
    _see_boots(state, seen, now)
    if window.span_s < config.interval_s * 0.999 and not _hurry(state, seen, config):
        return False
    state.past.append(
        Interval(
            rate=window.arrivals / window.span_s,
            isl=window.prompts / window.told_prompts if window.told_prompts else 0.0,
            osl=window.answers / window.told_answers if window.told_answers else 0.0,
        )
    )
    state.window = _Window()
    return True


def _hurry(state: PlannerState, seen: Observation, config: PlannerConfig) -> bool:
    window, sla = state.window, config.sla
    if state.past or window.looks < FIRST_LOOKS or not window.told_prompts or not window.told_answers:
        return False
    late = sla.ttft_s is not None and (seen.ttft_s or 0.0) > sla.ttft_s
    return late or (sla.itl_s is not None and (seen.itl_s or 0.0) > sla.itl_s)


def forecast_of(state: PlannerState, config: PlannerConfig) -> Forecast | None:
    """The most demand until a replica asked for at the next look could serve; None before there is any."""
    usual = state.usual()
    if usual is None:
        return None
    steps = 1 + math.ceil(state.boot_s / config.interval_s)
    season = round(config.season_s / config.interval_s)
    rate = max(predict(config.predictor, [one.rate for one in state.past], steps, season))
    isl = predict(config.predictor, [one.isl for one in state.past if one.isl], steps, season)
    osl = predict(config.predictor, [one.osl for one in state.past if one.osl], steps, season)
    return Forecast(
        rate=rate,
        isl=max(1.0, sum(isl) / steps),
        osl=max(1.0, sum(osl) / steps),
        hit_rate=state.hit_rate,
        isl_cv=state.isl_cv,
    )


def costs_of(state: PlannerState, config: PlannerConfig) -> tuple[Costs, dict[Role, str]]:
    """Costs of a replica by role, as far as known, and where from: a profile's source, an estimate that was
    corrected, or learnt.
    """
    profiles: dict[Role, Profile] = {}
    sources: dict[Role, str] = {}
    learns = any(one.profile is None for one in config.roles.values())
    prefill = fit_prefill(state.prefill) if learns else None
    decode = fit_decode(state.decode) if learns else None
    for role, bounds in config.roles.items():
        limits = bounds.limits
        if limits is not None and state.kv_tokens:
            limits = msgspec.structs.replace(limits, kv_tokens=state.kv_tokens)
        if bounds.profile is not None and bounds.profile.source == "estimate":
            estimate = _with_room(bounds.profile, state)
            profiles[role], seen = corrected(estimate, state.prefill, state.decode, _after_s(config))
            sources[role] = "estimate, corrected" if seen else "estimate"
            continue
        if bounds.profile is not None:
            profile = bounds.profile
            profiles[role] = msgspec.structs.replace(profile, limits=profile.limits or limits)
            sources[role] = profile.source or "profile"
            continue
        known = {"prefill": prefill is not None, "decode": decode is not None}
        if known.get(role, prefill is not None and decode is not None):
            profiles[role], sources[role] = profile_of(prefill, decode, limits), "learnt"
    return Costs(config.sla, config.routing, profiles), sources


def _after_s(config: PlannerConfig) -> Callable[[float], float]:
    """What the model adds to the reading of a prompt before its first token, on idle workers: where answers
    are written apart, its KV moves and is waited for by a step.
    """
    writer = config.roles.get("decode")
    profile = writer.profile if writer else None
    if profile is None:
        return lambda tokens: 0.0
    return lambda tokens: profile.transfer_s(round(tokens)) + FIRST_STEPS * profile.decode_s(1, tokens)


def _with_room(profile: Profile, state: PlannerState) -> Profile:
    """An estimate with the KV that engines tell."""
    if profile.limits is None or not state.kv_tokens:
        return profile
    limits = msgspec.structs.replace(profile.limits, kv_tokens=state.kv_tokens)
    return msgspec.structs.replace(profile, limits=limits)


def _smooth(state: PlannerState, seen: Observation) -> None:
    """Slow values: the share of cached tokens, the spread of prompts."""
    part = 1.0 / _OF_LATE
    if seen.hit_rate is not None and seen.arrivals:
        state.hit_rate += part * (seen.hit_rate - state.hit_rate)
    if seen.isl_cv is not None and seen.arrivals > 1:
        state.isl_cv += part * (seen.isl_cv - state.isl_cv)


def _learn(state: PlannerState, seen: Observation) -> None:
    """Samples of what was seen. Of prompts only where none waited: else the wait would be learnt."""
    workers = [worker for load in seen.roles.values() for worker in load.workers]
    waits = seen.queued or any(worker.waiting > 0 for worker in workers)
    if seen.ttft_mean_s is not None and seen.isl and not waits:
        state.prefill.add((seen.isl * (1.0 - state.hit_rate),), seen.ttft_mean_s)
    writers = next((load for role, load in seen.roles.items() if role != "prefill"), None)
    if seen.itl_mean_s is None or not seen.isl or not seen.osl or writers is None or not writers.workers:
        return
    running = sum(worker.running for worker in writers.workers) / len(writers.workers)
    if running > 0:
        state.decode.add((running, running * (seen.isl + seen.osl / 2)), seen.itl_mean_s)


def _see_boots(state: PlannerState, seen: Observation, now: float) -> None:
    """How long a replica takes that was asked for, once it is ready: the slowest of late counts.

    One that may have taken over a running engine does not tell that others boot fast.
    """
    for role, own in state.roles.items():
        load = seen.roles[role]
        if own.asked_at is not None and load.ready >= load.wanted and load.wanted == own.target:
            took_s = now - own.asked_at
            state.boot_s = max(took_s, (1.0 if own.moved else 0.7) * state.boot_s)
