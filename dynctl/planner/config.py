"""What the planner goes by: service level, bounds, and how the costs of a replica are known. Values only.

Times in seconds, rates a second, lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import Limits, Profile
from dynctl.perfmodel.queueing import Routing
from dynctl.protocol.instances import Role

Mode = Literal["throughput", "load", "both"]
Predictor = Literal["constant", "moving_average", "arima", "kalman", "seasonal"]


@dataclass(frozen=True, slots=True)
class RoleConfig:
    """One role: so many replicas at least and at most, GPUs of one replica.

    `profile`: what a replica costs, corrected by what is seen where its source is an estimate; None = it is
    learnt from what is seen alone, as `unestimated` gives the reason. `limits`: of a replica, where the
    profile tells none; the KV in them is replaced by what engines tell.
    """

    minimum: int = 1
    maximum: int = 64
    gpus: int = 1
    profile: Profile | None = None
    limits: Limits | None = None
    unestimated: str = ""


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """Rules of `planner.core.decide`.

    `interval_s`: between two looks at demand, and what a forecast is made of; `load_interval_s`: between two
    looks at the load. `season_s`: after so long demand repeats itself (predictor seasonal). `gpus`: most GPUs
    in all; 0 = no limit. `headroom`: so much more than the forecast is planned for. `slack`: it goes down
    only when the fewer replicas would serve so much more still. `cooldown_s`: after a change nothing is taken
    away for so long, and only what was not needed for so long. `boot_s`: from a decision to a replica that
    serves, until it has been seen. `limit_s`: a replica that is not ready after that is given up; `retry_s`:
    how long growth of a role waits after that. `routing`: how requests find their worker. `advisory`: what is
    decided is only told, and carried out by nobody.
    """

    sla: Sla
    roles: Mapping[Role, RoleConfig] = field(default_factory=dict)
    mode: Mode = "both"
    interval_s: float = 60.0
    load_interval_s: float = 5.0
    predictor: Predictor = "kalman"
    season_s: float = 86_400.0
    gpus: int = 0
    headroom: float = 0.1
    slack: float = 0.15
    cooldown_s: float = 180.0
    boot_s: float = 60.0
    limit_s: float = 1800.0
    retry_s: float = 120.0
    routing: Routing = "least_work"
    advisory: bool = False
