"""A deployment in miniature for the planner: replicas that boot and drain, arrivals as a Poisson process."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.planner.config import PlannerConfig, RoleConfig
from dynctl.planner.core import Decision, decide
from dynctl.planner.memory import PlannerState
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role

LIMITS = Limits(kv_tokens=400_000, sequences=256, batched_tokens=8192)
LAW = msgspec.structs.replace(DEFAULT, limits=LIMITS, source="measured")
SLA = Sla(ttft_s=0.5, itl_s=0.02)
BOTH = RoleConfig(maximum=12, profile=LAW)


def config(**changes: object) -> PlannerConfig:
    """Prefill and decode of a known law, up to 12 replicas each."""
    made: dict[str, object] = {"sla": SLA, "roles": {"prefill": BOTH, "decode": BOTH}, **changes}
    return PlannerConfig(**made)  # type: ignore[arg-type]


@dataclass
class World:
    """Replicas as decided, ready after `boot_s`; an even load over them, no worker hotter than others."""

    rules: PlannerConfig
    wanted: dict[Role, int]
    boot_s: float = 30.0
    isl: float = 2000.0
    osl: float = 200.0
    seed: int = 1
    now: float = 0.0
    state: PlannerState = field(default_factory=PlannerState)
    decisions: list[Decision] = field(default_factory=list)
    booting: list[tuple[Role, float]] = field(default_factory=list)
    look: Callable[[Observation], Observation] = lambda seen: seen

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def ready(self, role: Role) -> int:
        """Replicas that serve."""
        return self.wanted[role] - sum(one == role and at > self.now for one, at in self.booting)

    def run(self, rate: float, seconds: float) -> list[Decision]:
        """So many seconds at that rate; the decisions that changed something."""
        ends, changed = self.now + seconds, []
        while self.now < ends:
            decision = self.tick(rate)
            if decision.changed:
                changed.append(decision)
        return changed

    def tick(self, rate: float) -> Decision:
        """One look."""
        span = self.rules.load_interval_s
        self.now += span
        mean = rate * span
        arrivals = max(0, round(self.rng.gauss(mean, math.sqrt(mean))))
        roles: dict[Role, RoleLoad] = {role: self._load(role, rate) for role in self.wanted}
        seen = Observation(
            span_s=span,
            arrivals=arrivals,
            roles=roles,
            isl=self.isl if arrivals else None,
            osl=self.osl if arrivals else None,
            ttft_mean_s=0.065 if arrivals else None,
            itl_mean_s=0.01 if arrivals else None,
        )
        decision = decide(self.state, self.look(seen), self.rules, self.now)
        self.decisions.append(decision)
        for role, target in decision.targets.items():
            more = target - self.wanted[role]
            self.booting += [(role, self.now + self.boot_s)] * max(0, more)
            self.wanted[role] = target
        return decision

    def _load(self, role: Role, rate: float) -> RoleLoad:
        ready = self.ready(role)
        busy = rate * 0.065 / max(1, ready) if role != "decode" else 0.0
        queue = min(50.0, busy * busy / (1.0 - busy) / 2.0) if busy < 1.0 else 50.0
        running = rate * self.osl * 0.012 / max(1, ready) if role != "prefill" else 0.0
        worker = WorkerLoad(
            id="w", prefill_tokens=queue * self.isl, running=running, waiting=int(queue), kv_usage=0.2
        )
        wanted = self.wanted[role]
        return RoleLoad(wanted=wanted, ready=ready, starting=wanted - ready, workers=(worker,) * ready)
