"""What the planner tells frontends, so that their metrics show it."""

from __future__ import annotations

import msgspec

PLANNER_TOPIC = b"planner"


class PlannerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Values of the planner's metrics: name → labels' value (a role, or "") → value."""

    gauges: dict[str, dict[str, float]]
    decisions: list[tuple[str, str, int]] = []
    """(role, code, how often since the controller's start)."""
