"""When the warm-up of an open loop is over: once batches are as full as they get. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dynctl.profiler.load.record import Record
from dynctl.profiler.load.spec import Load

STAYS = 2.0
"""A load is settled when it has lasted so many times as long as a request: by then as many end as come."""
_MOST_S = 60.0


class Settling:
    """Decides for one load which request is the first that counts. `warmup`: those before it, as far as
    known; `cut`: the warm-up had to end before the load was settled.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self.warmup = load.warmup
        self.over = not load.settle
        self.cut = False

    def due(self, number: int, at_s: float, records: Sequence[Record]) -> bool:
        """Whether a request is still to be sent, `at_s` after the begin of the load.

        The warm-up goes on until the longest stay so far has passed twice, for a minute or as long as the
        rest of the load takes at most: a service that cannot keep up never settles.
        """
        if not self.over and number >= self._load.warmup:
            stay_s = max((self._stay_s(record) for record in records if record.completed), default=0.0)
            settled = bool(stay_s) and at_s >= STAYS * stay_s
            self.cut = not settled and at_s >= self._most_s(number, at_s)
            self.over = settled or self.cut
            self.warmup = max(number, self._load.warmup) if self.over else number + 1
        return not self.over or not self._load.requests or number < self.warmup + self._load.requests

    def _stay_s(self, record: Record) -> float:
        return record.e2e_s * self._load.turns + self._load.think_s * (self._load.turns - 1)

    def _most_s(self, number: int, at_s: float) -> float:
        if self._load.duration_s:
            return self._load.duration_s / 2.0
        return max(_MOST_S, self._load.requests * at_s / max(1, number))
