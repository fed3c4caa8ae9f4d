"""The part of a recipe that is about the planner."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dynctl.recipe.section import Section
from dynctl.recipe.units import Duration

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=10)]
Span = Annotated[Duration, Field(gt=0)]


class PlannerRole(Section):
    """Bounds of one role."""

    min_replicas: Count = 1
    """Never fewer."""
    max_replicas: Count | None = None
    """Never more; default: as many as the GPUs allow."""
    profile: str = ""
    """Profile file of this role, where it differs from `planner.profile`."""


class PlannerRoles(Section):
    """Bounds of the roles that there are."""

    prefill: PlannerRole = Field(default_factory=PlannerRole)
    """Prefill workers."""
    decode: PlannerRole = Field(default_factory=PlannerRole)
    """Decode workers."""
    aggregated: PlannerRole = Field(default_factory=PlannerRole)
    """Workers that do both."""


class Planner(Section):
    """Adds and removes replicas so that `sla` is kept (docs/planner.md)."""

    enabled: bool = True
    """Whether it works; a recipe without this section has none."""
    advisory: bool = False
    """Only tell what it would do (`dynctl planner why`)."""
    mode: Literal["throughput", "load", "both"] = "both"
    """throughput: by a forecast of demand; load: by what waits at the workers; both: the forecast is the
    floor, load works above it.
    """
    interval: Span = 60.0
    """Between two forecasts."""
    load_interval: Span = 5.0
    """Between two looks at the load."""
    predictor: Literal["constant", "moving_average", "arima", "kalman", "seasonal"] = "kalman"
    """How demand is forecast."""
    season: Span = 86_400.0
    """After so long demand repeats itself (predictor seasonal)."""
    roles: PlannerRoles = Field(default_factory=PlannerRoles)
    """Bounds by role."""
    max_gpus: Annotated[int, Field(ge=0)] = 0
    """Most GPUs for all workers together; 0: those of the deployment's hosts."""
    headroom: Share = 0.1
    """So much more demand than forecast is planned for."""
    cooldown: Span = 180.0
    """After a change nothing is taken away for so long, and only what was not needed for so long."""
    boot_time: Span = 60.0
    """What a replica takes until it serves, until that has been seen: so far ahead it looks."""
    start_limit: Span = 900.0
    """A new replica that is not ready after that is taken back."""
    retry: Span = 120.0
    """How long growth that failed is not tried again; doubled each time, up to 16 times."""
    profile: str = ""
    """What a replica costs: a file that `dynctl profile` wrote; without one it is estimated, and corrected by
    what is seen.
    """
    gpu: str = ""
    """Which GPU that estimate is for, such as h200_sxm; default: what the driver on the head says."""
