"""What each (worker, rank) has to do: what this frontend sent it, exactly, and others' load, as reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dynctl.protocol.kv_events import LoadReport


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
    """

    __slots__ = (
        "_before",
        "_peak",
        "_shared",
        "_unshared",
        "others_blocks",
        "others_requests",
        "others_waiting",
        "own_requests",
        "own_waiting",
        "prefill_tokens",
    )

    def __init__(self) -> None:
        self.prefill_tokens = 0
        self.own_requests = 0
        self.own_waiting = 0
        self.others_requests = 0
        self.others_waiting = 0
        self.others_blocks = 0
        self._shared: Counter[int] = Counter()
        self._unshared = 0
        self._peak = _Peak()
        self._before = _Peak()

    @property
    def own_blocks(self) -> int:
        """Blocks of our own requests, shared ones counted once."""
        return len(self._shared) + self._unshared

    @property
    def blocks(self) -> int:
        """Blocks in use, ours and others'."""
        return len(self._shared) + self._unshared + self.others_blocks

    @property
    def requests(self) -> int:
        """Requests, ours and others'."""
        return self.own_requests + self.others_requests

    def shared_depth(self, hashes: Sequence[int]) -> int:
        """How many of `hashes`, from the start, requests of ours already hold there.

        Requests hold whole prefixes, so the held part of `hashes` has no holes and bisection finds its end.
        """
        shared = self._shared
        if not hashes or hashes[0] not in shared:
            return 0
        low, high = 1, len(hashes)
        while low < high:
            middle = (low + high + 1) // 2
            if hashes[middle - 1] in shared:
                low = middle
            else:
                high = middle - 1
        return low

    def add(self, footprint: Footprint) -> Ticket:
        """Count a request in. The ticket takes it out again."""
        self.prefill_tokens += footprint.prefill_tokens
        self.own_requests += 1
        self.own_waiting += 1
        self._shared.update(footprint.hashes)
        self._unshared += footprint.blocks
        peak = self._peak
        peak.requests = max(peak.requests, self.own_requests)
        peak.waiting = max(peak.waiting, self.own_waiting)
        peak.blocks = max(peak.blocks, self.own_blocks)
        return Ticket(self, footprint)

    def report(self, report: LoadReport) -> None:
        """Take over what the engine says of itself."""
        now, before = self._peak, self._before
        own_requests = max(now.requests, before.requests)
        self.others_requests = max(0, report.running + report.waiting - own_requests)
        self.others_waiting = max(0, report.waiting - max(now.waiting, before.waiting))
        used = round(report.kv_usage * report.kv_blocks)
        self.others_blocks = max(0, used - max(now.blocks, before.blocks))
        self._before = now
        self._peak = _Peak(self.own_requests, self.own_waiting, self.own_blocks)

    def _end_prefill(self, footprint: Footprint) -> None:
        self.prefill_tokens -= footprint.prefill_tokens
        self.own_waiting -= 1

    def _end(self, footprint: Footprint) -> None:
        self.own_requests -= 1
        self._unshared -= footprint.blocks
        shared = self._shared
        for h in footprint.hashes:
            left = shared[h] - 1
            if left:
                shared[h] = left
            else:
                del shared[h]


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
