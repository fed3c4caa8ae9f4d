"""Why a process ended, whether it would end the same way again, and why one is not ready. Pure."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from dynctl.deploy.state import SeatRecord
from dynctl.protocol.exits import LastWords

MAX_FAILED_STARTS = 5
SHOWN_LINES = 10
_PERMANENT_KINDS = frozenset({"port_in_use", "recipe", "usage", "placement"})
_VARYING = re.compile(r"0x[0-9a-f]+|\d+", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Failure:
    """One end of one process. `told`: it said why itself, rather than being killed from outside."""

    message: str
    lines: tuple[str, ...]
    told: bool
    permanent: bool
    kind: str


def describe_exit(
    code: int | None, words: LastWords | None, lines: Sequence[str], verdict: str = ""
) -> Failure:
    """What is known of an exit: our verdict if we killed it, else its last words, else code and log."""
    if verdict:
        return Failure(verdict, tuple(lines[-SHOWN_LINES:]), told=True, permanent=False, kind="not_ready")
    if words is not None:
        shown = tuple(words.lines[-SHOWN_LINES:]) or tuple(lines[-SHOWN_LINES:])
        return Failure(words.message, shown, told=True, permanent=words.permanent, kind=words.kind)
    if code is None:
        message = "ended, and only its parent could have seen how"
    elif code < 0:
        message = f"killed by {signal_name(-code)}"
    else:
        message = f"exited with code {code}"
    killed = code is None or code < 0
    return Failure(
        message, () if killed else tuple(lines[-SHOWN_LINES:]), told=not killed, permanent=False, kind="exit"
    )


def signature(failure: Failure) -> str:
    """The same for two failures with the same cause: message and last line without their numbers."""
    last = failure.lines[-1] if failure.lines else ""
    return _VARYING.sub("#", f"{failure.kind}|{failure.message}|{last}").lower()


def gives_up(failure: Failure, *, same: bool, failed_starts: int, ever_ready: bool) -> bool:
    """Whether to stop trying after a start that never became ready.

    At once when the process said that another try is useless; at the second time in a row for the same
    reason, if it never worked before; else after MAX_FAILED_STARTS in a row.
    """
    if failure.permanent:
        return True
    if not ever_ready and failure.kind in _PERMANENT_KINDS:
        return True
    if same and failure.told and not ever_ready:
        return True
    return failed_starts >= MAX_FAILED_STARTS


def signal_name(number: int) -> str:
    """SIGKILL for 9; a number the system has no name for as it is."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


URGENCY = {"failed": 0, "lost": 1, "silent": 2, "backoff": 3, "draining": 4, "starting": 5}
"""Of states: which of several seats that are not ready says best why the deployment is not."""


def reason_of(seat: SeatRecord) -> str:
    """Why this seat is not ready, in one line."""
    if seat.state == "failed":
        return f"{seat.id} gave up: {seat.last_exit}"
    if seat.state == "backoff":
        return f"{seat.id} will be restarted: {seat.last_exit}"
    if seat.state == "starting" and seat.was_ready:
        return f"{seat.id} has not registered with the new controller yet"
    if seat.state == "drained":
        return f"{seat.id} is drained; dynctl undrain {seat.id} brings it back"
    if seat.state == "starting" and seat.last_exit:
        return f"{seat.id} is starting again: {seat.last_exit}"
    return f"{seat.id} is {seat.state}"
