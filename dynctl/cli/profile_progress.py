"""How far a measuring profile run is, on standard error: bars and the time that is left, or lines for a log.

A row is a layout that is measured, or a split that is tried whole.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from dynctl.cli.render import age, prose

if TYPE_CHECKING:
    from rich.console import Console

    from dynctl.cli.profile_bars import Bars


@dataclass(slots=True)
class Row:
    """`did`: steps behind it, of `total`."""

    total: int
    since_s: float
    did: int = 0


class Progress:
    """Entered and left around the run; leaves the terminal as it was, whatever happens in it.

    `budget_s`: the time there is for all of it. `console`: where bars go, None = a terminal on stderr.
    """

    def __init__(
        self,
        budget_s: float,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._budget_s, self._clock = budget_s, clock
        self._begun_s = clock()
        self._console = console
        self._rows: dict[str, Row] = {}
        self._bars: Bars | None = None

    def __enter__(self) -> Self:
        if self._console is not None or sys.stderr.isatty():
            from dynctl.cli.profile_bars import Bars

            self._bars = Bars(self._budget_s, self._console, self._clock)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, row: str, total: int) -> None:
        """A row with so many steps to go; one that is known begins anew."""
        self._rows[row] = Row(total, self._clock())
        if self._bars is not None:
            self._bars.add(row, total)
        else:
            self._line(f"{row}: {total} to measure")

    def step(self, row: str, doing: str, *, done: bool = False, lasts_s: float = 0.0) -> None:
        """What is being done; `done`: a step is behind it; `lasts_s`: what the row still takes, if known."""
        known = self._rows[row]
        known.did += done
        if self._bars is not None:
            self._bars.move(row, known.did, doing, lasts_s)
        elif done:
            self._line(f"{row}: {doing}, {known.did} of {known.total}")

    def end(self, row: str, told: str) -> None:
        """Nothing more of it; `told`: what came of it, in words."""
        known = self._rows[row]
        if self._bars is not None:
            self._bars.end(row, told)
        else:
            took = age(self._clock() - known.since_s)
            self._line(f"{row}: {told or 'done'}, took {took}")

    def _line(self, text: str) -> None:
        prose(f"{age(self._clock() - self._begun_s)}  {text}", style="dim")
