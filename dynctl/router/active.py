"""What each (worker, rank) has to do: what this frontend sent it, exactly, and others' load, as reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynctl.protocol.kv_events import LoadReport
from dynctl.router.shared import SharedBlocks


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one request adds to the load of the worker it goes to.

    `prefill_tokens`: prompt tokens to compute there. `hashes`: blocks that requests with the same prefix
    share. `blocks`: further blocks, shared with nobody.
    """

    prefill_tokens: int = 0
    hashes: Sequence[int] = ()
    blocks: int = 0


@dataclass(slots=True)
class _Peak:
    """The most there was at once since a report came."""

    requests: int = 0
    waiting: int = 0
    blocks: int = 0


class RankLoad:
    """The load of one (worker, rank). Own part exact; `others_*` from the last report.

    A report is older than the moment it arrives, so a request of ours that has just ended may still be in it.
    Others' load is therefore what the report has beyond our own *peak* since the report before last.
    `requests` and `blocks` are ours and others' together, shared blocks of ours counted once.
    """

    __slots__ = (
        "_before",
        "_peak",
        "_retired",
        "_shared",
        "blocks",
        "others_blocks",
        "others_requests",
        "others_waiting",
        "own_blocks",
        "own_requests",
        "own_waiting",
        "place",
        "prefill_tokens",
        "requests",
    )

    def __init__(self, shared: SharedBlocks) -> None:
        self._shared = shared
        self.place = shared.open()
        self._retired = False
        self.prefill_tokens = 0
        self.requests = self.own_requests = self.others_requests = 0
        self.blocks = self.own_blocks = self.others_blocks = 0
        self.own_waiting = self.others_waiting = 0
        self._peak = _Peak()
        self._before = _Peak()

    def add(self, footprint: Footprint) -> Ticket:
        """Count a request in. The ticket takes it out again."""
        self.prefill_tokens += footprint.prefill_tokens
        self.own_waiting += 1
        self._count(1, footprint.blocks + self._shared.add(self.place, footprint.hashes))
        peak = self._peak
        peak.requests = max(peak.requests, self.own_requests)
        peak.waiting = max(peak.waiting, self.own_waiting)
        peak.blocks = max(peak.blocks, self.own_blocks)
        return Ticket(self, footprint)

    def report(self, report: LoadReport) -> None:
        """Take over what the engine says of itself."""
        now, before = self._peak, self._before
        self.others_requests = max(0, report.running + report.waiting - max(now.requests, before.requests))
        self.others_waiting = max(0, report.waiting - max(now.waiting, before.waiting))
        used = round(report.kv_usage * report.kv_blocks)
        self.others_blocks = max(0, used - max(now.blocks, before.blocks))
        self._count(0, 0)
        self._before = now
        self._peak = _Peak(self.own_requests, self.own_waiting, self.own_blocks)

    def retire(self) -> None:
        """The worker is gone: no further `add`. Requests that still run keep their tickets."""
        self._retired = True
        self._close_if_done()

    def _count(self, requests: int, blocks: int) -> None:
        self.own_requests += requests
        self.own_blocks = self.own_blocks + blocks if self.own_requests else 0
        self.requests = self.own_requests + self.others_requests
        self.blocks = self.own_blocks + self.others_blocks

    def _end_prefill(self, footprint: Footprint) -> None:
        self.prefill_tokens -= footprint.prefill_tokens
        self.own_waiting -= 1

    def _end(self, footprint: Footprint) -> None:
        self._count(-1, -footprint.blocks - self._shared.remove(self.place, footprint.hashes))
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._retired and not self.own_requests:
            self._shared.close(self.place)


class Ticket:
    """One request's place in a worker's load. Both calls may be repeated; `finish` implies `first_token`."""

    __slots__ = ("_done", "_footprint", "_load", "_prefilling")

    def __init__(self, load: RankLoad, footprint: Footprint) -> None:
        self._load = load
        self._footprint = footprint
        self._prefilling = True
        self._done = False

    def first_token(self) -> None:
        """The prompt has been computed: release its prefill tokens."""
        if self._prefilling:
            self._prefilling = False
            self._load._end_prefill(self._footprint)

    def finish(self) -> None:
        """The request is over, however it ended: release all it held."""
        self.first_token()
        if not self._done:
            self._done = True
            self._load._end(self._footprint)
