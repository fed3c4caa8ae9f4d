"""Looks at many deadlines share their wake-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dynctl.http.sweep import Sweeper, next_beat


@pytest.mark.parametrize(
    ("now_s", "interval_s", "due_s"),
    [(0.0, 1.0, 1.0), (10.25, 1.0, 11.0), (10.25, 0.5, 10.5), (10.995, 1.0, 12.0), (10.98, 1.0, 11.0)],
)
def test_beats_are_multiples_of_the_interval(now_s: float, interval_s: float, due_s: float) -> None:
    assert next_beat(now_s, interval_s) == due_s


class Clock:
    """A loop whose time is set by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        self.due.append((when_s, call))

    def run_until(self, end_s: float) -> None:
        while self.due and min(self.due, key=lambda one: one[0])[0] <= end_s:
            next_ = min(self.due, key=lambda one: one[0])
            self.due.remove(next_)
            self.now_s = next_[0]
            next_[1]()


def test_sweepers_begun_apart_look_at_the_same_moments() -> None:
    clock: Any = Clock()
    looks: dict[str, list[float]] = {"one": [], "other": []}
    for name, begun_s in (("one", 0.3), ("other", 0.8)):
        clock.now_s = begun_s

        def look(now_s: float, name: str = name) -> bool:
            looks[name].append(now_s)
            return True

        Sweeper(clock, look).ensure(1.0)
    clock.run_until(3.5)
    assert looks == {"one": [1.0, 2.0, 3.0], "other": [1.0, 2.0, 3.0]}
