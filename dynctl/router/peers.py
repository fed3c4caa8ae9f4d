"""What frontends tell each other: their requests in flight, and thresholds changed while running. Pure.

A frontend's choices are only as good as its view of each worker's load, and with N frontends 1/N of that is
its own. Every message holds what is, not what has changed by how much, so one that is lost, late or doubled
does no lasting harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dynctl.protocol.inflight import BusyChange, Inflight, WorkerInflight
from dynctl.protocol.specs import BusySpec
from dynctl.router.active import NOTHING, InFlight, RankLoad

SILENT_S = 3.0
"""A frontend that was last heard of longer ago is taken for dead: what it had in flight counts no more."""

_TICK_S = 0.001
_Key = tuple[str, int, int]
"""Worker id, incarnation, rank."""


@dataclass(frozen=True, slots=True)
class PeerState:
    """How well one other frontend is heard. `missed`: messages of it that never came, or came late."""

    frontend: str
    heard: bool
    missed: int
    requests: int


@dataclass(slots=True)
class _Peer:
    """`entries`: the number of the message that told it, and what it told."""

    incarnation: int
    heard_at: float
    seq: int = -1
    missed: int = 0
    entries: dict[_Key, tuple[int, InFlight]] = field(default_factory=dict)


class Peers:
    """Both directions for one router. Until `begin` nothing is told: a frontend alone pays nothing."""

    def __init__(self) -> None:
        self._me: tuple[str, int] | None = None
        self._wake: Callable[[], None] | None = None
        self._loads: dict[_Key, RankLoad] = {}
        self._changed: set[_Key] = set()
        self._seq = 0
        self._peers: dict[str, _Peer] = {}
        self._expected: frozenset[str] = frozenset()
        self._busy: BusyChange | None = None
        self._busy_told = True
        self.on_busy: Callable[[BusySpec], None] | None = None
        """Called with thresholds that were changed at another frontend, later than those known here."""

    def begin(self, frontend: str, incarnation: int, wake: Callable[[], None]) -> None:
        """Tell as this frontend from now on. `wake` is called when there is something to tell again."""
        self._me, self._wake = (frontend, incarnation), wake
        for key, load in self._loads.items():
            load.on_change = partial(self._note, key)

    @property
    def begun(self) -> bool:
        """Whether this frontend is one of several."""
        return self._me is not None

    def attach(self, worker: str, incarnation: int, loads: Sequence[RankLoad]) -> None:
        """A worker is there; `loads` by rank."""
        for rank, load in enumerate(loads):
            key = (worker, incarnation, rank)
            self._loads[key] = load
            if self._me is not None:
                load.on_change = partial(self._note, key)
                self._sum(key)

    def detach(self, worker: str, incarnation: int) -> None:
        """That worker is gone."""
        for key in [key for key in self._loads if key[:2] == (worker, incarnation)]:
            self._loads.pop(key).on_change = None
            self._changed.discard(key)

    # What to tell

    def _note(self, key: _Key) -> None:
        if not self._changed and self._wake is not None:
            self._wake()
        self._changed.add(key)

    def set_busy(self, busy: BusySpec, now_s: float) -> None:
        """Thresholds were changed here, at `now_s` (Unix time): the other frontends are to go by them too."""
        before_s = self._busy.since_s if self._busy is not None else 0.0
        self._busy = BusyChange(max(now_s, before_s + _TICK_S), busy)
        self._busy_told = False
        if self._wake is not None:
            self._wake()

    def changes(self) -> Inflight | None:
        """What has changed since this or `whole` was last asked; None = nothing."""
        if not self._changed and self._busy_told:
            return None
        return self._message(sorted(self._changed), whole=False)

    def whole(self) -> Inflight:
        """All there is in flight."""
        return self._message([key for key, load in self._loads.items() if load.own_requests], whole=True)

    def _message(self, keys: Iterable[_Key], *, whole: bool) -> Inflight:
        assert self._me is not None, "begin comes first"
        entries = []
        for key in keys:
            own = self._loads[key].own
            entries.append(WorkerInflight(*key, own.requests, own.waiting, own.prefill_tokens, own.blocks))
        self._changed.clear()
        self._busy_told = True
        seq, self._seq = self._seq, self._seq + 1
        return Inflight(*self._me, seq, whole, entries, self._busy)

    # What was heard

    def expect(self, frontends: Iterable[str]) -> None:
        """Who the other frontends are now; what others have told is forgotten."""
        self._expected = frozenset(frontends)
        for name in [name for name in self._peers if name not in self._expected]:
            self._forget(name)

    def take(self, message: Inflight, now: float) -> None:
        """Take one message; older news than is known of an entry is passed over."""
        peer = self._peers.get(message.frontend)
        if peer is None or peer.incarnation < message.incarnation:
            if message.frontend not in self._expected:
                return
            self._forget(message.frontend)
            peer = self._peers[message.frontend] = _Peer(message.incarnation, now, message.seq - 1)
        elif peer.incarnation > message.incarnation:
            return
        peer.heard_at = now
        peer.missed += max(0, message.seq - peer.seq - 1)
        peer.seq = max(peer.seq, message.seq)
        self._hear_busy(message.busy)
        changed = [self._put(peer, entry, message.seq) for entry in message.entries]
        if message.whole:
            told = set(changed)
            stale = [k for k, (seq, _) in peer.entries.items() if seq < message.seq and k not in told]
            for key in stale:
                del peer.entries[key]
            changed += stale
        for key in changed:
            self._sum(key)

    def _hear_busy(self, told: BusyChange | None) -> None:
        if told is None or (self._busy is not None and told.since_s <= self._busy.since_s):
            return
        self._busy = told
        if self.on_busy is not None:
            self.on_busy(told.busy)

    def _put(self, peer: _Peer, entry: WorkerInflight, seq: int) -> _Key:
        key = (entry.worker, entry.incarnation, entry.rank)
        if peer.entries.get(key, (-1, NOTHING))[0] < seq:
            told = InFlight(entry.requests, entry.waiting, entry.prefill_tokens, entry.blocks)
            peer.entries[key] = (seq, told)
        return key

    def expire(self, now: float) -> list[str]:
        """Forget what frontends have told that were last heard more than SILENT_S ago; who they are."""
        silent = [name for name, peer in self._peers.items() if now - peer.heard_at > SILENT_S]
        for name in silent:
            self._forget(name)
        return silent

    def states(self) -> list[PeerState]:
        """All other frontends, by name."""
        found = []
        for name in sorted(self._expected):
            peer = self._peers.get(name)
            if peer is None:
                found.append(PeerState(name, heard=False, missed=0, requests=0))
            else:
                requests = sum(told.requests for _, told in peer.entries.values())
                found.append(PeerState(name, heard=True, missed=peer.missed, requests=requests))
        return found

    def doubts(self) -> list[str]:
        """Whose load is not known, in words."""
        return [
            f"{state.frontend}: nothing is heard of it, so its requests count only as far as engines tell"
            for state in self.states()
            if not state.heard
        ]

    def _forget(self, frontend: str) -> None:
        peer = self._peers.pop(frontend, None)
        for key in peer.entries if peer is not None else ():
            self._sum(key)

    def _sum(self, key: _Key) -> None:
        """Work out anew what all peers together have at one (worker, rank)."""
        load = self._loads.get(key)
        if load is None:
            return
        requests = waiting = prefill_tokens = blocks = 0
        for peer in self._peers.values():
            told = peer.entries.get(key)
            if told is not None:
                part = told[1]
                requests += part.requests
                waiting += part.waiting
                prefill_tokens += part.prefill_tokens
                blocks += part.blocks
        load.set_peers(InFlight(requests, waiting, prefill_tokens, blocks))
