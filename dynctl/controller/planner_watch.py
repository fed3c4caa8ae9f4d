"""Whether there is a planner, for whoever must not load what reads recipes: that takes a quarter second."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

from dynctl.deploy.home import RunDir
from dynctl.deploy.state import RunState
from dynctl.protocol.planner import PlannerFigures

LOOK_S = 1.0
"""Between two looks."""
_SECTION = re.compile(r"^planner:", re.MULTILINE)

Note = Callable[[str, dict[str, str | int | float]], None]


def has_section(run: RunDir) -> bool:
    """Whether the run's recipe has a section for the planner. Raises OSError."""
    return _SECTION.search(run.lock.read_text()) is not None


async def plan_replicas(
    run: RunDir, state: RunState, note: Note, tell: Callable[[PlannerFigures], None]
) -> None:
    """The planner, for ever, from when the recipe has one. `note` and `tell` as in `planning.PlanDesk`."""
    while True:
        if _planned(run):
            break
        await asyncio.sleep(LOOK_S)
    from dynctl.controller.planning import PlanDesk, Planning

    await Planning(PlanDesk(run, state, note, tell)).run()


def _planned(run: RunDir) -> bool:
    try:
        return has_section(run)
    except OSError:
        return True  # the planner tells what is wrong
