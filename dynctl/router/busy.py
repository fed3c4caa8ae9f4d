"""Which workers have so much to do that requests had better go elsewhere, or wait. Pure.

Thresholds are what the operator set, judged on the exact count of what was sent and on the last report. A
backlog is what keeps an engine busy without more: while it lasts a request loses nothing by waiting here,
where it can still go to whichever worker is free first.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynctl.protocol.specs import BusySpec
from dynctl.router.active import RankLoad
from dynctl.router.request import Candidate

BATCH_TOKENS = 8192
"""Tokens an engine computes per step, where it is not known: the usual default."""


class Busy:
    """Judges the load of (worker, rank)s. `thresholds` may be changed at any time.

    `backlog`: batches of prompt tokens from which on requests wait, 0 = never.
    """

    def __init__(self, thresholds: BusySpec, backlog: float) -> None:
        self.thresholds = thresholds
        self.backlog = backlog

    @property
    def thresholds(self) -> BusySpec:
        """What the operator set; `limited`: any of it."""
        return self._thresholds

    @thresholds.setter
    def thresholds(self, thresholds: BusySpec) -> None:
        self._thresholds = thresholds
        self.limited = thresholds != BusySpec()

    def over(self, load: RankLoad) -> bool:
        """Whether a rank is over any of the thresholds."""
        limits = self._thresholds
        tokens, blocks = load.prefill_tokens, load.capacity
        return (
            (limits.prefill_tokens is not None and tokens > limits.prefill_tokens)
            or (limits.prefill_share is not None and tokens > limits.prefill_share * _batch(load))
            or (
                limits.decode_blocks is not None
                and blocks > 0
                and load.blocks > limits.decode_blocks * blocks
            )
        )

    def backlogged(self, load: RankLoad) -> bool:
        """Whether a rank has enough to compute without more.

        The engine must say so too: an answer that is not streamed does not show when its prompt is done, so
        much of what is counted here may have been computed long ago. Of the requests counted as waiting only
        so many are taken to be as the engine says do wait.
        """
        said = load.reported_waiting
        if not self.backlog or said <= 0:
            return False
        counted = load.own_waiting + load.peers.waiting
        return load.prefill_tokens * min(1.0, said / max(1, counted)) > self.backlog * _batch(load)

    def all_busy(self, candidates: Sequence[Candidate]) -> bool:
        """Whether none of the (worker, rank)s may be given more; False when there are none."""
        for candidate in candidates:
            load = candidate.load
            if not self.backlogged(load) and not (self.limited and self.over(load)):
                return False
        return bool(candidates)


def _batch(load: RankLoad) -> int:
    return load.batch_tokens or BATCH_TOKENS
