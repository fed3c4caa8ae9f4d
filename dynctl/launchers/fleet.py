"""The processes of a run on all its nodes, as its controller sees and moves them.

Nodes may be far, slow, hung or gone: calls are async and end by a deadline of their own, and what nodes tell
by themselves (`ended`, `news`) is taken without waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynctl import procfs
from dynctl.launchers.base import Launch, Launcher, Owned, ProcessHandle, RunRef
from dynctl.launchers.execute import execute
from dynctl.launchers.last_lines import tail, telling_lines
from dynctl.protocol.day2 import ExecReply, NodeRoom
from dynctl.protocol.exits import LastWords, read_last_words

_SEARCHED_LINES = 200
_SHOWN_LINES = 10
_LOOK_AGAIN_S = 0.02


@dataclass(frozen=True, slots=True)
class Seated:
    """The process in a seat: which incarnation, on which node. `started`: the seat and incarnation that it
    was started as, where those are others.
    """

    seat: str
    incarnation: int
    node: str
    handle: ProcessHandle
    started: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A process that has ended. `code` as in `launchers.base.Exit`; `words` it left, else the telling lines
    of its log.
    """

    seat: str
    incarnation: int
    code: int | None
    words: LastWords | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeNews:
    """A node can no longer be reached, or can again. `why` is for people; it has been so for `silent_s`."""

    node: str
    reachable: bool
    why: str = ""
    silent_s: float = 0.0


class Fleet(Protocol):
    """Starts, watches and ends processes of one run on all its nodes."""

    async def start(self, launch: Launch) -> ProcessHandle:
        """Start a process on `launch.node` that outlives the controller. Raises LaunchError."""
        ...

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """Which of these, all there are, have ended, as far as is known now. Does not block; each is told
        once or again.
        """
        ...

    def news(self) -> list[NodeNews]:
        """What has changed about nodes since the last call. Does not block."""
        ...

    def doubt(self, node: str, address: str, port: int) -> None:
        """All that ran on a node has fallen silent: find out whether it can be reached (it has used that port
        at that address). What comes of it is told by `news`. Does not block; may be said again and again.
        """
        ...

    async def signal(self, seated: Seated, signum: int) -> bool:
        """Signal exactly this process; False when it is gone."""
        ...

    async def clear(self, node: str, seat: str, incarnation: int, within_s: float) -> list[int]:
        """Kill all that is left of a seat up to this incarnation and see it gone, so that ports and GPUs are
        free. Returns the pids that would not go; also those of a node that does not answer ([-1]).
        """
        ...

    async def lives(self, seated: Seated) -> bool:
        """Whether this very process lives. True when its node cannot be asked: nothing is started twice."""
        ...

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """Run a command on `launch.node` to its end, as if it were started in that seat; what it said.

        Raises LaunchError when it cannot be started, or does not end in time.
        """
        ...

    async def room(self) -> dict[str, NodeRoom]:
        """What is not to be had on the nodes, as far as it is for the fleet to ask: nodes may be missing."""
        ...

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """Have the run claim just these GPUs of the node. Raises PlacementError for one that another
        deployment has, other DynctlError when it cannot be done.
        """
        ...

    async def dismiss(self) -> None:
        """The run has ended: nothing is needed on the nodes any more. Called before `close`, if at all."""
        ...

    async def close(self) -> None:
        """Let go of all nodes; what runs there runs on."""
        ...


class LocalFleet:
    """The one node that this process runs on. `hold` claims GPUs there; None: there is nobody to heed."""

    def __init__(
        self, launcher: Launcher, run: RunRef, hold: Callable[[Collection[int]], None] | None = None
    ) -> None:
        self._launcher = launcher
        self._run = run
        self._hold = hold

    async def start(self, launch: Launch) -> ProcessHandle:
        """As `Fleet`."""
        return self._launcher.start(launch, self._run)

    def ended(self, seats: Sequence[Seated]) -> list[Ended]:
        """As `Fleet`."""
        by_pid = {seated.handle.pid: seated for seated in seats}
        exits = self._launcher.poll([seated.handle for seated in seats])
        return [self.told(by_pid[one.handle.pid], one.code) for one in exits]

    def told(self, seated: Seated, code: int | None) -> Ended:
        """What is known here of a process that has ended."""
        path = self._run.run_dir
        words = read_last_words(path, seated.seat, seated.incarnation)
        lines = telling_lines(tail(path / "logs" / f"{seated.seat}.log", _SEARCHED_LINES), _SHOWN_LINES)
        return Ended(seated.seat, seated.incarnation, code, words, tuple(lines))

    def news(self) -> list[NodeNews]:
        """None: it is always there."""
        return []

    def doubt(self, node: str, address: str, port: int) -> None:
        """There is none."""

    async def signal(self, seated: Seated, signum: int) -> bool:
        """As `Fleet`."""
        return self._launcher.signal(seated.handle, signum)

    async def clear(self, node: str, seat: str, incarnation: int, within_s: float) -> list[int]:
        """As `Fleet`."""
        ends = time.monotonic() + within_s
        while left := self._left_of(seat, incarnation):
            if time.monotonic() > ends:
                return [one.handle.pid for one in left]
            self._launcher.kill(left)
            await asyncio.sleep(_LOOK_AGAIN_S)
        return []

    async def lives(self, seated: Seated) -> bool:
        """As `Fleet`: the recorded process, of this run, seat and incarnation."""
        handle = seated.handle
        return procfs.alive(handle.pid, handle.start_ticks) and any(
            one.handle.pid == handle.pid
            and one.process_id == seated.seat
            and one.incarnation == seated.incarnation
            for one in self._launcher.owned(self._run.run_id)
        )

    async def exec(self, launch: Launch, timeout_s: float) -> ExecReply:
        """As `Fleet`."""
        return await execute(launch, self._run.run_id, timeout_s)

    async def room(self) -> dict[str, NodeRoom]:
        """None: whoever plans is on this node too, and looks by itself."""
        return {}

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        """As `Fleet`."""
        if self._hold is not None:
            await asyncio.to_thread(self._hold, gpus)

    async def dismiss(self) -> None:
        """Nothing was needed."""

    async def close(self) -> None:
        """Nothing to let go of."""

    def _left_of(self, seat: str, incarnation: int) -> list[Owned]:
        owned = self._launcher.owned(self._run.run_id)
        return [one for one in owned if one.process_id == seat and one.incarnation <= incarnation]
