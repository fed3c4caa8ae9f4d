"""What each (worker, rank) has to do: what the frontends sent it, exactly, and others' load, as reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from dynctl.protocol.kv_events import LoadReport
from dynctl.router.shared import SharedBlocks


# gc=False: numbers only, so it can be part of no cycle.
class Footprint(msgspec.Struct, frozen=True, gc=False):
    """What one request adds to the load of the worker it goes to.

    `prefill_tokens`: prompt tokens to compute there. `hashes`: blocks that requests with the same prefix
    share. `blocks`: further blocks, shared with nobody.
    """

    prefill_tokens: int = 0
    hashes: Sequence[int] = ()
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class InFlight:
    """What frontends have at a (worker, rank) now: requests, those of them before their first token, the
    prompt tokens these still need computed, and KV blocks held.
    """

    requests: int = 0
    waiting: int = 0
    prefill_tokens: int = 0
    blocks: int = 0


NOTHING = InFlight()


@dataclass(slots=True)
class _Peak:
    """The most there was at once since a report came."""

    requests: int = 0
    waiting: int = 0
    blocks: int = 0


class RankLoad:
    """The load of one (worker, rank). Own part exact, `peers` as the other frontends tell it; `others_*` (who
    is no frontend of this deployment) from the last report.

    A report is older than the moment it arrives, so a request of ours that has just ended may still be in it.
    Others' load is therefore what the report has beyond the *peak* of our own and our peers' since the report
    before last. `requests`, `blocks` and `prefill_tokens` are of all; blocks that requests of ours share are
    counted once, those shared with a peer's twice. `on_change` is called when the own part has changed,
    `on_freed` when there may be less to do, `on_computed` at the end of a request whose prompt was computed,
    with its hashes and when it was added. `capacity` in blocks, and `batch_tokens` that a step computes: 0 =
    not known. `reported_waiting`: those that wait in the engine, -1 = it has not said. `last`: all it said.
    """

    __slots__ = (
        "_before",
        "_peak",
        "_retired",
        "_shared",
        "batch_tokens",
        "blocks",
        "capacity",
        "last",
        "on_change",
        "on_computed",
        "on_freed",
        "others_blocks",
        "others_requests",
        "others_waiting",
        "own_blocks",
        "own_requests",
        "own_waiting",
        "peers",
        "place",
        "prefill_tokens",
        "reported_waiting",
        "requests",
    )

    def __init__(self, shared: SharedBlocks) -> None:
        self._shared = shared
        self.place = shared.open()
        self._retired = False
        self.on_change: Callable[[], None] | None = None
        self.on_freed: Callable[[], None] | None = None
        self.on_computed: Callable[[Sequence[int], float], None] | None = None
        self.capacity = self.batch_tokens = 0
        self.reported_waiting = -1
        self.last: LoadReport | None = None
        self.peers = NOTHING
        self.prefill_tokens = 0
        self.requests = self.own_requests = self.others_requests = 0
        self.blocks = self.own_blocks = self.others_blocks = 0
        self.own_waiting = self.others_waiting = 0
        self._peak = _Peak()
        self._before = _Peak()

    def add(self, footprint: Footprint, now_s: float = 0.0) -> Ticket:
        """Count a request in. The ticket takes it out again. `now_s` is what `on_computed` is told."""
        self.prefill_tokens += footprint.prefill_tokens
        self.own_waiting += 1
        self._count(1, footprint.blocks + self._shared.add(self.place, footprint.hashes))
        self._note_peak()
        if self.on_change is not None:
            self.on_change()
        return Ticket(self, footprint, now_s)

    @property
    def own(self) -> InFlight:
        """This frontend's part."""
        prefill_tokens = self.prefill_tokens - self.peers.prefill_tokens
        return InFlight(self.own_requests, self.own_waiting, prefill_tokens, self.own_blocks)

    def set_peers(self, peers: InFlight) -> None:
        """Take over what the other frontends have here, all together.

        Word from a peer may come after a report that had its requests in it already: what peers have gained
        is taken off what was believed to be others'.
        """
        known, self.peers = self.peers, peers
        self.prefill_tokens += peers.prefill_tokens - known.prefill_tokens
        self.others_requests = _less(self.others_requests, peers.requests - known.requests)
        self.others_waiting = _less(self.others_waiting, peers.waiting - known.waiting)
        self.others_blocks = _less(self.others_blocks, peers.blocks - known.blocks)
        self._note_peak()
        self._count(0, 0)
        self._freed()

    def report(self, report: LoadReport) -> None:
        """Take over what the engine says of itself."""
        now, before = self._peak, self._before
        self.others_requests = max(0, report.running + report.waiting - max(now.requests, before.requests))
        self.others_waiting = max(0, report.waiting - max(now.waiting, before.waiting))
        used = round(report.kv_usage * report.kv_blocks)
        self.others_blocks = max(0, used - max(now.blocks, before.blocks))
        self._count(0, 0)
        self._before = now
        self._peak = _Peak()
        self._note_peak()
        self.capacity, self.reported_waiting, self.last = report.kv_blocks, report.waiting, report
        self._freed()

    def retire(self) -> None:
        """The worker is gone: no further `add`. Requests that still run keep their tickets."""
        self._retired = True
        self._close_if_done()

    def _count(self, requests: int, blocks: int) -> None:
        self.own_requests += requests
        self.own_blocks = self.own_blocks + blocks if self.own_requests else 0
        peers = self.peers
        self.requests = self.own_requests + peers.requests + self.others_requests
        self.blocks = self.own_blocks + peers.blocks + self.others_blocks

    def _note_peak(self) -> None:
        peak, peers = self._peak, self.peers
        peak.requests = max(peak.requests, self.own_requests + peers.requests)
        peak.waiting = max(peak.waiting, self.own_waiting + peers.waiting)
        peak.blocks = max(peak.blocks, self.own_blocks + peers.blocks)

    def _end_prefill(self, footprint: Footprint) -> None:
        self.prefill_tokens -= footprint.prefill_tokens
        self.own_waiting -= 1
        if self.on_change is not None:
            self.on_change()
        self._freed()

    def _end(self, footprint: Footprint) -> None:
        self._count(-1, -footprint.blocks - self._shared.remove(self.place, footprint.hashes))
        if self.on_change is not None:
            self.on_change()
        self._freed()
        self._close_if_done()

    def _freed(self) -> None:
        if self.on_freed is not None:
            self.on_freed()

    def _close_if_done(self) -> None:
        if self._retired and not self.own_requests:
            self._shared.close(self.place)


def _less(amount: int, gained: int) -> int:
    """`amount` without what others have gained, never below 0."""
    return max(0, amount - max(0, gained))


class Ticket:
    """One request's place in a worker's load. Both calls may be repeated; `finish` implies `first_token`."""

    __slots__ = ("_done", "_footprint", "_load", "_prefilling", "_since_s")

    def __init__(self, load: RankLoad, footprint: Footprint, since_s: float) -> None:
        self._load = load
        self._footprint = footprint
        self._since_s = since_s
        self._prefilling = True
        self._done = False

    def first_token(self) -> None:
        """The prompt has been computed: release its prefill tokens."""
        if self._prefilling:
            self._prefilling = False
            self._load._end_prefill(self._footprint)

    def finish(self) -> None:
        """The request is over, however it ended: release all it held."""
        if self._done:
            return
        computed = not self._prefilling
        self.first_token()
        self._done = True
        self._load._end(self._footprint)
        if computed and self._load.on_computed is not None:
            self._load.on_computed(self._footprint.hashes, self._since_s)
