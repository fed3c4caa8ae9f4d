"""The live view of a deployment: stages, counts, processes. Drawn on terminals, told in lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from dynctl.cli.pick import launcher_of, state
from dynctl.cli.remedies import new_controller
from dynctl.cli.render import STATE_STYLES, age, program, prose
from dynctl.deploy.home import RunDir
from dynctl.deploy.status import ready_counts
from dynctl.deploy.stop import Stopper
from dynctl.deploy.watch import Waiter, changes
from dynctl.errors import LaunchError
from dynctl.launchers.base import ProcessHandle
from dynctl.protocol.deployment import DeploymentView

if TYPE_CHECKING:
    from rich.text import Text

_RICH_STYLES = {"error": "red", "warning": "yellow", "good": "green", "dim": "dim"}


class Screen(Protocol):
    """Something that shows a deployment."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, seen: DeploymentView) -> None:
        """Show it as it is now."""
        ...


def screen() -> Screen:
    """A drawn one on a terminal, else lines; both on standard error."""
    return DrawnScreen() if sys.stderr.isatty() else PlainScreen()


class PlainScreen:
    """One line for each change of what the view says."""

    def __init__(self) -> None:
        self._last = ""

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put back."""

    def show(self, seen: DeploymentView) -> None:
        """Print a line if it says something new."""
        line = f"{seen.name}: {seen.phase}, ready {ready_counts(seen)}"
        if seen.reason and seen.phase != "starting":
            line += f": {seen.reason}"
        if line != self._last:
            prose(line)
        self._last = line


class DrawnScreen:
    """A view that is drawn anew in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._since = time.monotonic()
        self._seen: DeploymentView | None = None
        self._live = Live(
            console=Console(stderr=True, highlight=False),
            get_renderable=self._draw,
            refresh_per_second=8,
            transient=True,
        )

    def __enter__(self) -> DrawnScreen:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, seen: DeploymentView) -> None:
        """Draw this from now on."""
        self._seen = seen

    def _draw(self) -> Text:
        from rich.text import Text

        drawn = Text()
        for text, style in view_parts(self._seen, time.monotonic() - self._since):
            drawn.append(text, style=_RICH_STYLES.get(style, style))
        return drawn


def view_parts(seen: DeploymentView | None, seconds: float) -> list[tuple[str, str]]:
    """The view as pieces of text with their styles."""
    if seen is None:
        return [("starting the controller", "dim")]
    phase_style = STATE_STYLES.get(seen.phase, "")
    parts: list[tuple[str, str]] = [
        (f"{seen.name}  ", "bold"),
        (seen.phase, phase_style),
        (f"  {ready_counts(seen)}  {seen.url}  {age(seconds)}\n", ""),
    ]
    for stage, done in stages(seen):
        parts.append(("✓ " if done else "· ", "good" if done else "dim"))
        parts.append((f"{stage}   ", "" if done else "dim"))
    width = max((len(row.id) for row in seen.processes), default=0)
    for row in seen.processes:
        parts.append((f"\n  {row.id.ljust(width)}  ", ""))
        parts.append((row.state.ljust(9), STATE_STYLES.get(row.state, "")))
        parts.append((f" pid {row.pid}" if row.pid else "", "dim"))
        parts.append((f"  restarts {row.restarts}" if row.restarts else "", "warning"))
    if seen.reason and seen.phase != "starting":
        parts.append((f"\n{seen.reason}", "warning"))
    return parts


def stages(seen: DeploymentView) -> list[tuple[str, bool]]:
    """The stages on the way up, and whether each is behind us."""
    workers = [r for r in seen.processes if r.role != "frontend"]
    frontends = [r for r in seen.processes if r.role == "frontend"]
    return [
        ("planned", True),
        ("controller", bool(seen.controller_pid)),
        ("processes", all(r.pid for r in seen.processes)),
        ("frontend", all(r.ready for r in frontends)),
        ("workers", all(r.ready for r in workers)),
        ("serving", seen.phase == "ready"),
    ]


def attend(run: RunDir) -> int:
    """Show a running deployment until it ends (0) or loses its controller (raises LaunchError).

    Ctrl-C leaves it running and says how to come back.
    """
    kept = state(run)
    handle = ProcessHandle(kept.controller.pid, kept.controller.start_ticks, kept.controller.pid)
    return follow(run, handle, Stopper(launcher_of(run)))


def follow(run: RunDir, controller: ProcessHandle, stopper: Stopper) -> int:
    """As `attend`, with the controller's handle known."""
    name, last = state(run).name, None
    try:
        with screen() as shown:
            for seen in changes(run, controller, Waiter(stopper, shown.show)):
                if seen is not None:
                    shown.show(seen)
                    last = seen
    except KeyboardInterrupt:
        prose(f"\nleft {name} running; {ways_back(name)}")
        return 0
    if last is not None and last.phase == "degraded":
        raise LaunchError(
            f"the controller of '{name}' is gone; traffic goes on",
            where=str(run.path),
            hint=new_controller(run),
        )
    prose(f"{name} has ended: {last.phase if last is not None else 'stopped'}")
    return 0


def ways_back(name: str) -> str:
    """How to see and to end a deployment that was left."""
    return f"{program()} status {name} --watch comes back, {program()} down {name} ends it"
