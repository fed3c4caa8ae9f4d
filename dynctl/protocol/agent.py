"""What a controller asks the agent of a node: start, look, signal, end processes there."""

from __future__ import annotations

import msgspec

from dynctl.protocol.exits import LastWords


class Proc(msgspec.Struct, frozen=True, kw_only=True):
    """One process, as `launchers.base.ProcessHandle` has it, in its seat."""

    seat: str
    incarnation: int
    pid: int
    start_ticks: int
    pgid: int


class StartCall(msgspec.Struct, frozen=True, kw_only=True):
    """Start this incarnation of a seat. One that runs is given back as it is: asking twice starts once.

    `files` are paths below the node's run directory; `cwd` "" is that directory. Answer: `Proc`.
    """

    seat: str
    incarnation: int
    argv: list[str]
    env: dict[str, str]
    cwd: str = ""
    files: dict[str, str] = {}


class LookCall(msgspec.Struct, frozen=True, kw_only=True):
    """Which of these have ended? Answer: `LookReply`."""

    procs: list[Proc]


class EndedProc(msgspec.Struct, frozen=True, kw_only=True):
    """One that has ended: its exit code (None = unknown), last words, the telling lines of its log."""

    seat: str
    incarnation: int
    code: int | None
    words: LastWords | None
    lines: list[str]


class LookReply(msgspec.Struct, frozen=True, kw_only=True):
    """Those that have ended, each as often as it is asked for."""

    ended: list[EndedProc]


class SignalCall(msgspec.Struct, frozen=True, kw_only=True):
    """Signal exactly this process. Answer: `Found`."""

    proc: Proc
    signum: int


class LivesCall(msgspec.Struct, frozen=True, kw_only=True):
    """Does exactly this process live, in this seat of this run? Answer: `Found`."""

    proc: Proc


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """Whether the process was there."""

    found: bool


class ClearCall(msgspec.Struct, frozen=True, kw_only=True):
    """Kill all of a seat up to this incarnation, and see it gone. Answer: `ClearReply`."""

    seat: str
    incarnation: int
    within_s: float


class ClearReply(msgspec.Struct, frozen=True, kw_only=True):
    """The pids that would not go."""

    left: list[int]


class HoldCall(msgspec.Struct, frozen=True, kw_only=True):
    """Claim just these GPUs of the node for the run. Refused with a PlacementError for what another has."""

    gpus: list[int]


class NodeExec(msgspec.Struct, frozen=True, kw_only=True):
    """Run a command to its end, with this added to the environment. Answer: `protocol.day2.ExecReply`."""

    seat: str
    argv: list[str]
    env: dict[str, str]
    cwd: str = ""
    timeout_s: float = 5.0


class LogCall(msgspec.Struct, frozen=True, kw_only=True):
    """What has been written to the logs of this node since these places (source → bytes). Answer: `LogReply`.

    `last_bytes`: of a source without a place only so much from its end.
    """

    places: dict[str, int] = {}
    last_bytes: int = 1 << 20


class LogPart(msgspec.Struct, frozen=True, kw_only=True):
    """Whole lines of one source, and the place after them."""

    source: str
    text: bytes
    place: int


class LogReply(msgspec.Struct, frozen=True, kw_only=True):
    """What is new; `more`: ask again at once."""

    parts: list[LogPart]
    more: bool = False
