"""The bars of a measuring profile run, by rich: the budget's first, then one for each row."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from dynctl.cli.render import age

_BAR = 20
_BUDGET = "budget"


class Bars:
    """Drawn until `stop`. Rows are named by those who add them; their texts are no markup."""

    def __init__(self, budget_s: float, console: Console | None, clock: Callable[[], float]) -> None:
        self._clock, self._begun_s, self._budget_s = clock, clock(), budget_s
        plain = Column(no_wrap=True)
        self.drawn = Progress(
            TextColumn("{task.description}", style="bold", markup=False, table_column=plain),
            BarColumn(bar_width=_BAR),
            Count(),
            Left(clock),
            TextColumn(
                "{task.fields[told]}",
                style="dim",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            console=console or Console(stderr=True, highlight=False),
            get_time=clock,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._budget = self.drawn.add_task(_BUDGET, total=max(budget_s, 1e-9), told="")

    def start(self) -> None:
        """Draw from now on."""
        self.drawn.start()

    def stop(self) -> None:
        """Draw a last time, without the budget, and give the terminal back."""
        self.drawn.remove_task(self._budget)
        self.drawn.stop()

    def add(self, row: str, total: int) -> None:
        """A bar at the end; a row that is known begins anew there."""
        if row in self._tasks:
            self.drawn.remove_task(self._tasks[row])
        self._tasks[row] = self.drawn.add_task(row, total=total, told="waiting for GPUs")

    def move(self, row: str, did: int, doing: str, lasts_s: float) -> None:
        """So many steps are behind the row; it still takes so long, 0 = that is to be judged by those."""
        ends_s = self._clock() + lasts_s if lasts_s else 0.0
        self.drawn.update(self._tasks[row], completed=did, told=doing, ends_s=ends_s)
        self.drawn.update(self._budget, completed=min(self._clock() - self._begun_s, self._budget_s))

    def end(self, row: str, told: str) -> None:
        """The bar stays, full as far as it came: what was not done was not needed, or `told` says why."""
        did = self.drawn.tasks[self.drawn.task_ids.index(self._tasks[row])].completed
        self.drawn.update(self._tasks[row], told=told, total=did or None)
        self.drawn.stop_task(self._tasks[row])


class Count(ProgressColumn):
    """3/7 steps; blank for the budget."""

    def render(self, task: Task) -> Text:
        """Of one row."""
        counted = task.description != _BUDGET and task.total is not None
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if counted else "")


class Left(ProgressColumn):
    """The time that is left: of the budget; of a row as it is known, or judged by the steps behind it.

    Blank until one is behind it; how long it took once it has ended.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        """Of one row."""
        if task.total is None or task.elapsed is None:
            return Text("")
        if task.description == _BUDGET:
            return Text(f"{age(task.total - task.elapsed)} left", style="cyan")
        if task.stop_time is not None:
            return Text(f"took {age(task.elapsed)}", style="dim")
        if task.fields.get("ends_s"):
            return Text(f"~{age(max(0.0, task.fields['ends_s'] - self._clock()))} left", style="cyan")
        if not task.completed or task.completed >= task.total:
            return Text("")
        each = task.elapsed / task.completed
        return Text(f"~{age(each * (task.total - task.completed))} left", style="cyan")
