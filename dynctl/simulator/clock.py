"""A clock that jumps from one thing that happens to the next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

Act = Callable[[], None]


class Clock:
    """`now_s` is simulated time. What is due at one moment happens in the order it was asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Act]] = []
        self._order = itertools.count()

    def at(self, at_s: float, act: Act) -> None:
        """Have `act` called at a time that is not past."""
        heapq.heappush(self._due, (at_s, next(self._order), act))

    def step(self) -> bool:
        """Go on to what is due next, and do it; False when nothing is."""
        if not self._due:
            return False
        self.now_s, _, act = heapq.heappop(self._due)
        act()
        return True
