"""How far a measuring profile run is, on standard error: a bar for each layout on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from dynctl.cli.render import age, prose


class Progress:
    """Entered and left around the run."""

    def __init__(self, budget_s: float) -> None:
        self._budget_s, self._begun_s = budget_s, time.monotonic()
        self._drawn: Any = None
        self._rows: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._drawn = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                progress.TextColumn("[dim]{task.fields[told]}"),
                console=Console(stderr=True, highlight=False),
            )
            self._rows[""] = self._drawn.add_task("budget", total=self._budget_s, told="")
            self._drawn.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawn is not None:
            self._drawn.remove_task(self._rows[""])
            self._drawn.stop()

    def begin(self, row: str, total: int) -> None:
        """A row with so many steps to go."""
        if self._drawn is not None:
            self._rows[row] = self._drawn.add_task(row, total=total, told="waiting for GPUs")

    def step(self, row: str, doing: str, *, done: bool = False) -> None:
        """What is being done; `done`: a step is behind it."""
        if self._drawn is None:
            if done or doing == "starting":
                prose(f"{self._passed()}  {row}: {doing}", style="dim")
            return
        self._drawn.update(self._rows[row], told=doing, advance=1 if done else 0)
        self._drawn.update(self._rows[""], completed=time.monotonic() - self._begun_s)

    def end(self, row: str, told: str) -> None:
        """Nothing more of it."""
        if self._drawn is None:
            if told:
                prose(f"{self._passed()}  {row}: {told}", style="dim")
            return
        number = self._rows[row]
        task = next(task for task in self._drawn.tasks if task.id == number)
        self._drawn.update(number, total=max(1, task.completed), completed=max(1, task.completed), told=told)

    def _passed(self) -> str:
        return age(time.monotonic() - self._begun_s)
