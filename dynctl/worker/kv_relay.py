"""An engine's KV events, translated and numbered, onto the event plane; and what readers missed of them.

Per data-parallel rank: the engine's own stream comes in order (see `transport.engine_events`), each batch
that changes something goes out under the next number, the last ones are kept for readers with a gap. When
engine events are lost for good, a `Cleared` goes out and the index is built anew from what follows.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from dynctl.errors import CodecError
from dynctl.kv.translate import Translator
from dynctl.protocol.kv_events import Cleared, EngineKvBatch, KvBatch, KvEvent, KvSync, KvSyncReply
from dynctl.transport.engine_events import EngineEventSource, EngineSubscriber

logger = logging.getLogger(__name__)

KEPT_BATCHES = 4096


class RankRelay:
    """One rank's events. Pure but for the injected `publish`."""

    def __init__(
        self, worker: str, incarnation: int, rank: int, *, publish: Callable[[KvBatch], None], kept: int
    ) -> None:
        self.resets = 0
        self._worker = worker
        self._incarnation = incarnation
        self._rank = rank
        self._publish = publish
        self._translator = Translator(rank)
        self._next = 0
        self._kept: deque[KvBatch] = deque(maxlen=kept)
        self._quiet = False

    def feed(self, batch: EngineKvBatch) -> None:
        """The engine's next batch."""
        self._send(self._translator.feed(batch))

    def reset(self, reason: str) -> None:
        """What was known is not to be relied on any more."""
        self.resets += 1
        logger.warning("kv_index.reset worker=%s rank=%d reason=%s", self._worker, self._rank, reason)
        self._translator.reset()
        self._send([Cleared()])

    def beat(self) -> None:
        """Called now and then: repeats the last batch after a quiet time, so that losing it shows."""
        if self._quiet and self._kept:
            self._publish(self._kept[-1])
        self._quiet = True

    def sync(self, from_seq: int) -> KvSyncReply:
        """All batches from that number on, or the whole when they are not kept any more."""
        first = self._next - len(self._kept)
        kept = first <= from_seq <= self._next
        return KvSyncReply(
            incarnation=self._incarnation,
            rank=self._rank,
            next_seq=self._next,
            batches=list(self._kept)[from_seq - first :] if kept else [],
            snapshot=None if kept else self._translator.snapshot(),
            block_size=self._translator.block_size,
            resets=self.resets,
        )

    def set_block_size(self, block_size: int) -> None:
        """What the engine says its block size is, before its first event shows it."""
        if block_size and not self._translator.block_size:
            self._translator.block_size = block_size

    def _send(self, events: list[KvEvent]) -> None:
        if not events:
            return
        batch = KvBatch(
            self._worker, self._incarnation, self._rank, self._next, events, self._translator.block_size
        )
        self._next += 1
        self._kept.append(batch)
        self._quiet = False
        self._publish(batch)


class KvRelay:
    """All ranks of one engine; survives it: `attach` again when it, or one in its place, is back."""

    def __init__(
        self,
        worker: str,
        incarnation: int,
        sources: Sequence[EngineEventSource],
        *,
        decode: Callable[[bytes], EngineKvBatch],
        publish: Callable[[KvBatch], None],
    ) -> None:
        self._incarnation = incarnation
        self._sources = sources
        self._decode = decode
        self._ranks = [
            RankRelay(worker, incarnation, rank, publish=publish, kept=KEPT_BATCHES)
            for rank in range(len(sources))
        ]
        self._subscribers: list[EngineSubscriber] = []
        self._attached_before = False

    def attach(self, block_size: int) -> None:
        """Listen to the engine, from all it still keeps. `block_size` as it says itself, 0 = not said."""
        for rank, source in zip(self._ranks, self._sources, strict=True):
            if self._attached_before:
                rank.reset("the engine was away")
            rank.set_block_size(block_size)
            subscriber = EngineSubscriber(source, self._feeder(rank), rank.reset)
            self._subscribers.append(subscriber)
            subscriber.start()
        self._attached_before = True

    def detach(self) -> None:
        """Stop listening."""
        for subscriber in self._subscribers:
            subscriber.close()
        self._subscribers.clear()

    def beat(self) -> None:
        """See `RankRelay.beat`."""
        for rank in self._ranks:
            rank.beat()

    def sync(self, call: KvSync) -> KvSyncReply:
        """Answer a reader; a rank without events has none."""
        if not 0 <= call.rank < len(self._ranks):
            return KvSyncReply(incarnation=self._incarnation, rank=call.rank, next_seq=0)
        return self._ranks[call.rank].sync(call.from_seq)

    def _feeder(self, rank: RankRelay) -> Callable[[int, bytes], None]:
        def feed(seq: int, payload: bytes) -> None:
            try:
                batch = self._decode(payload)
            except CodecError as error:
                rank.reset(f"batch {seq} cannot be read: {error}")
                return
            rank.feed(batch)

        return feed
