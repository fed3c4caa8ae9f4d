"""How often a request is tried again, and where not. Pure: randomness and `now` are passed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from dynctl.errors import ConnectFailed, DynctlError

MAX_ATTEMPTS = 5
MAX_UNSENT = 10
"""Of attempts that never reached an engine: many may have died at once. One that did may have killed it."""
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0
RETRY_SHARE = 0.2
RETRIES_PER_S = 10.0
RETRY_RESERVE = 100.0


class Budget:
    """How many attempts all requests together may make again, so that retries do not multiply a storm.

    Each request earns `RETRY_SHARE` of a retry, each second `RETRIES_PER_S`; `RETRY_RESERVE` is the most that
    is saved, and what there is at first. Only failures that load can cause are to be charged for.
    """

    def __init__(self) -> None:
        self._left = RETRY_RESERVE
        self._at_s: float | None = None

    def earn(self) -> None:
        """A request has come."""
        self._left = min(RETRY_RESERVE, self._left + RETRY_SHARE)

    def spend(self, now_s: float) -> bool:
        """Take one retry; False when none is left."""
        passed_s = 0.0 if self._at_s is None else now_s - self._at_s
        self._at_s = now_s
        self._left = min(RETRY_RESERVE, self._left + passed_s * RETRIES_PER_S)
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True


class AttemptFailed(Exception):
    """An attempt ended without its answer: it may be made again elsewhere, or gone on with if it had begun.

    `failed` are workers that themselves failed; `suspects` those that may be the cause: they are avoided as
    long as there is another.
    """

    def __init__(
        self,
        cause: DynctlError,
        *,
        failed: frozenset[str] = frozenset(),
        suspects: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.failed = failed
        self.suspects = suspects


@dataclass(slots=True)
class Attempts:
    """The attempts of one request so far."""

    rng: Random
    limit: int = MAX_ATTEMPTS
    made: int = 0
    unsent: int = 0
    failed: frozenset[str] = frozenset()
    suspects: frozenset[str] = frozenset()
    last: DynctlError | None = field(default=None)

    def note(self, failure: AttemptFailed) -> float | None:
        """Take a failure over; seconds to wait before the next attempt, None when there is to be none.

        There are `limit` attempts, and `MAX_UNSENT` that reached no engine. The wait doubles with each and is
        drawn between half of it and the whole, so that requests that failed together do not come back so.
        """
        unsent = isinstance(failure.cause, ConnectFailed)
        self.unsent += unsent
        self.made += not unsent
        self.last = failure.cause
        self.failed |= failure.failed
        self.suspects |= failure.suspects
        if self.made >= self.limit or self.unsent >= MAX_UNSENT:
            return None
        whole = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.made + self.unsent - 1))
        return whole * self.rng.uniform(0.5, 1.0)

    def exclusions(self, shunned: frozenset[str]) -> list[frozenset[str]]:
        """Sets of workers not to choose, the strictest first; every request avoids `shunned` just now."""
        ladder = [self.failed | self.suspects | shunned, self.failed | self.suspects, self.failed]
        return [step for number, step in enumerate(ladder) if step not in ladder[:number]]
