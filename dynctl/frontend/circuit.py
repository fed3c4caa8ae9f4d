"""A circuit breaker for each worker: who is left alone for a while, who is tried again. Pure; `now` is given.

Closed → open: at the first lost connection, or at `FAILURES` failures with no answer in between. Open → half
open after `FIRST_PAUSE_S`, twice as long after each probe that failed; half open, one request at a time
probes. Any answer closes it, also one that says "too much to do": who refuses lives. So load opens nothing,
but for requests that ran into their deadline: these count only against a worker that has answered nobody
since. And never more than `MAX_OPEN_SHARE` of a role's workers are open, so the last ones never are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dynctl.errors import DeadlineExceeded, DynctlError, Overloaded, PeerLost, Rejected

State = Literal["closed", "half_open", "open"]
STATES: tuple[State, ...] = ("closed", "half_open", "open")
"""The number of each in the metric."""

FAILURES = 3
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
PROBE_S = 10.0
"""How long a probe keeps others away; one that was cancelled never tells how it ended."""
MAX_OPEN_SHARE = 0.5

_NOBODY: frozenset[str] = frozenset()


@dataclass(slots=True)
class _Open:
    """An open circuit, half open from `until_s` on; a probe is under way until `probe_until_s`."""

    until_s: float
    pause_s: float
    probe_until_s: float = 0.0


class Circuits:
    """The circuits of all workers. `opened` counts how often each was opened."""

    def __init__(self) -> None:
        self._roles: dict[str, str] = {}
        self._sizes: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._open: dict[str, _Open] = {}
        self._heard_s: dict[str, float] = {}
        self.opened: Counter[str] = Counter()

    def members_changed(self, roles: Mapping[str, str]) -> None:
        """Take over which workers there are, by id, with their roles. Those that left are forgotten."""
        for worker in self._roles.keys() - roles.keys():
            self.forget(worker)
        self._roles = dict(roles)
        self._sizes = Counter(roles.values())

    def forget(self, worker: str) -> None:
        """It has gone, or a new incarnation of it has come, which starts without blame."""
        self._open.pop(worker, None)
        self._heard_s.pop(worker, None)
        del self._failures[worker], self.opened[worker]

    def avoided(self, now_s: float) -> frozenset[str]:
        """Workers that are to get no request now: open ones, and half-open ones that are being probed."""
        if not self._open:
            return _NOBODY
        return frozenset(
            worker
            for worker, circuit in self._open.items()
            if now_s < circuit.until_s or now_s < circuit.probe_until_s
        )

    def sent(self, worker: str, now_s: float) -> None:
        """A request was sent there: the probe, if it is half open."""
        circuit = self._open.get(worker)
        if circuit is not None and now_s >= circuit.until_s:
            circuit.probe_until_s = now_s + PROBE_S

    def answered(self, worker: str, now_s: float) -> None:
        """It has answered a request."""
        self._heard_s[worker] = now_s
        if self._failures or self._open:
            self._open.pop(worker, None)
            del self._failures[worker]

    def failed(self, worker: str, error: DynctlError, now_s: float, waited_s: float) -> bool:
        """A request failed there, with `error`, for which it was waited `waited_s`. True: this opened it."""
        if isinstance(error, Overloaded | Rejected):
            self.answered(worker, now_s)
            return False
        late = isinstance(error, DeadlineExceeded)
        if late and self._heard_s.get(worker, float("-inf")) > now_s - waited_s:
            return False
        self._failures[worker] += 1
        circuit = self._open.get(worker)
        if circuit is not None:
            if now_s >= circuit.until_s:
                circuit.pause_s = min(LONGEST_PAUSE_S, circuit.pause_s * 2)
                circuit.until_s, circuit.probe_until_s = now_s + circuit.pause_s, 0.0
            return False
        if not isinstance(error, PeerLost) and self._failures[worker] < FAILURES:
            return False
        return self._try_to_open(worker, now_s)

    def states(self, now_s: float) -> dict[str, State]:
        """The state of each worker's circuit."""
        states: dict[str, State] = dict.fromkeys(self._roles, "closed")
        for worker, circuit in self._open.items():
            states[worker] = "open" if now_s < circuit.until_s else "half_open"
        return states

    def _try_to_open(self, worker: str, now_s: float) -> bool:
        role = self._roles.get(worker)
        open_there = sum(1 for other in self._open if self._roles.get(other) == role)
        if role is None or open_there + 1 > MAX_OPEN_SHARE * self._sizes[role]:
            return False
        self._open[worker] = _Open(now_s + FIRST_PAUSE_S, FIRST_PAUSE_S)
        self.opened[worker] += 1
        return True
