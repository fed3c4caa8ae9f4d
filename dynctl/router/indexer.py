"""Numbered KV batches in, a true index out: what to apply, what to wait for, what to ask a worker for again.

Each (worker, incarnation, rank) numbers its batches from 0. The next one is applied, an earlier one ignored;
a later one shows a gap: it is kept while the worker is asked for what is missing. Pure: the caller makes the
calls that `Sync` asks for and hands the answers to `on_reply`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from dynctl.kv.index import Index, SlotKey
from dynctl.kv.media import Layouts
from dynctl.protocol.kv_events import KvBatch, KvSyncReply, Shown, Stored

MAX_PENDING = 4096
"""Batches kept while a gap is open. The oldest go first, which leaves a gap that the next answer shows."""

LOAD_CHUNK = 2048
"""Hashes of a snapshot per event given to the index."""


@dataclass(frozen=True, slots=True)
class Sync:
    """Ask `worker` for the batches of `rank` from number `from_seq` on."""

    worker: str
    incarnation: int
    rank: int
    from_seq: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """How well one (worker, rank) is followed.

    `gaps`: times that batches were missed. `reloads`: snapshots taken in place of missed batches.
    `worker_resets`: times the worker itself lost engine events for good. `block_size` in tokens, as its
    batches say (0 = not yet known).
    """

    worker: str
    incarnation: int
    rank: int
    state: Literal["syncing", "synced"]
    next_seq: int
    pending: int
    gaps: int
    reloads: int
    worker_resets: int
    block_size: int


@dataclass(slots=True)
class _Stream:
    next_seq: int = 0
    synced: bool = False
    loading: deque[Stored] = field(default_factory=deque)
    pending: dict[int, KvBatch] = field(default_factory=dict)
    gaps: int = 0
    reloads: int = 0
    worker_resets: int = 0
    block_size: int = 0


@dataclass(slots=True)
class _Worker:
    """`joined` is false when only batches told of this incarnation, not yet the membership."""

    incarnation: int
    joined: bool = True
    streams: dict[int, _Stream] = field(default_factory=dict)


class Indexer:
    """Keeps `index` true to what the joined workers publish; learns into `layouts` what images look like."""

    def __init__(
        self, index: Index, layouts: Layouts | None = None, *, max_pending: int = MAX_PENDING
    ) -> None:
        self._index = index
        self._layouts = Layouts() if layouts is None else layouts
        self._max_pending = max_pending
        self._workers: dict[str, _Worker] = {}

    def join(self, worker: str, incarnation: int, ranks: int) -> list[Sync]:
        """Follow a worker from its batch 0 on. A newer incarnation replaces the older and all it held.

        Returns what to ask for; [] when this or a newer incarnation is followed already.
        """
        known = self._workers.get(worker)
        if known is not None:
            if known.incarnation > incarnation or (known.incarnation == incarnation and known.joined):
                return []
            self._index.remove_worker(worker)
        self._workers[worker] = _Worker(incarnation, True, {rank: _Stream() for rank in range(ranks)})
        return [Sync(worker, incarnation, rank, 0) for rank in range(ranks)]

    def leave(self, worker: str) -> None:
        """Forget a worker and all it held."""
        if self._workers.pop(worker, None) is not None:
            self._index.remove_worker(worker)

    def on_batch(self, batch: KvBatch) -> Sync | None:
        """Take one published batch. Returns what to ask for when it shows a gap that was not known."""
        worker = self._current(batch.worker, batch.incarnation)
        if worker is None:
            return None
        stream = worker.streams.get(batch.rank)
        if stream is None:
            stream = worker.streams[batch.rank] = _Stream()
            self._keep(stream, batch)
            return Sync(batch.worker, batch.incarnation, batch.rank, 0)
        if batch.seq < stream.next_seq:
            return None
        if batch.seq == stream.next_seq and not stream.loading:
            self._apply(stream, batch)
            self._drain(stream)
            return None
        self._keep(stream, batch)
        if not stream.synced:
            return None
        stream.synced = False
        stream.gaps += 1
        return Sync(batch.worker, batch.incarnation, batch.rank, stream.next_seq)

    def on_reply(self, worker_id: str, reply: KvSyncReply) -> Sync | None:
        """Take the answer to a `Sync`. Returns what to ask for again when it left a gap.

        After an answer with a snapshot call `load` until it is done.
        """
        worker = self._current(worker_id, reply.incarnation)
        stream = worker.streams.get(reply.rank) if worker is not None else None
        if stream is None or stream.loading:
            return None
        key = (worker_id, reply.rank)
        stream.worker_resets = reply.resets
        stream.block_size = reply.block_size or stream.block_size
        self._learn(reply.shown)
        if reply.snapshot is not None and reply.next_seq >= stream.next_seq + stream.synced:
            self._index.reset(key)
            stream.reloads += 1
            stream.next_seq = reply.next_seq
            stream.loading.extend(_chunks(reply.snapshot))
        for batch in reply.batches:
            if batch.seq == stream.next_seq and not stream.loading:
                self._apply(stream, batch)
            elif batch.seq >= stream.next_seq:
                self._keep(stream, batch)
        if stream.loading:
            stream.synced = False
            return None
        self._drain(stream)
        stream.synced = stream.synced and stream.next_seq >= reply.next_seq
        return None if stream.synced else Sync(worker_id, reply.incarnation, reply.rank, stream.next_seq)

    def load(self, worker_id: str, rank: int) -> bool:
        """Take over one portion of the snapshot that `on_reply` got. Returns whether there is more."""
        worker = self._workers.get(worker_id)
        stream = worker.streams.get(rank) if worker is not None else None
        if stream is None or not stream.loading:
            return False
        self._index.apply((worker_id, rank), stream.loading.popleft())
        if not stream.loading:
            self._drain(stream)
        return bool(stream.loading)

    def state(self, worker_id: str, rank: int) -> StreamState | None:
        """How well one (worker, rank) is followed; None when it is not."""
        worker = self._workers.get(worker_id)
        stream = worker.streams.get(rank) if worker is not None else None
        if worker is None or stream is None:
            return None
        return StreamState(
            worker=worker_id,
            incarnation=worker.incarnation,
            rank=rank,
            state="synced" if stream.synced else "syncing",
            next_seq=stream.next_seq,
            pending=len(stream.pending),
            gaps=stream.gaps,
            reloads=stream.reloads,
            worker_resets=stream.worker_resets,
            block_size=stream.block_size,
        )

    def states(self) -> list[StreamState]:
        """All followed, ordered by worker and rank."""
        found = (self.state(*key) for key in self.followed())
        return [state for state in found if state is not None]

    def followed(self) -> list[SlotKey]:
        """The (worker, rank) pairs that are followed, in order."""
        return sorted((name, rank) for name, worker in self._workers.items() for rank in worker.streams)

    def _current(self, worker_id: str, incarnation: int) -> _Worker | None:
        """The worker, if it is followed in this incarnation. A newer one ends the older at once."""
        worker = self._workers.get(worker_id)
        if worker is None or incarnation < worker.incarnation:
            return None
        if incarnation > worker.incarnation:
            self._index.remove_worker(worker_id)
            self._workers[worker_id] = _Worker(incarnation, joined=False)
            return None
        return worker if worker.joined else None

    def _apply(self, stream: _Stream, batch: KvBatch) -> None:
        key = (batch.worker, batch.rank)
        for event in batch.events:
            self._index.apply(key, event)
        self._learn(batch.shown)
        stream.next_seq = batch.seq + 1
        stream.block_size = batch.block_size or stream.block_size

    def _learn(self, images: Iterable[Shown]) -> None:
        for image in images:
            self._layouts.learn(image)

    def _keep(self, stream: _Stream, batch: KvBatch) -> None:
        stream.pending[batch.seq] = batch
        if len(stream.pending) > self._max_pending:
            del stream.pending[next(iter(stream.pending))]

    def _drain(self, stream: _Stream) -> None:
        """Apply what was kept as far as it goes on from here; without a rest the stream is synced."""
        pending = stream.pending
        while pending:
            batch = pending.pop(stream.next_seq, None)
            if batch is None:
                break
            self._apply(stream, batch)
        for seq in [seq for seq in pending if seq < stream.next_seq]:
            del pending[seq]
        stream.synced = not pending


def _chunks(snapshot: list[Stored]) -> Iterator[Stored]:
    """The snapshot in events of at most LOAD_CHUNK hashes."""
    for stored in snapshot:
        hashes = iter(stored.hashes)
        while part := list(islice(hashes, LOAD_CHUNK)):
            yield Stored(part, stored.tier)
