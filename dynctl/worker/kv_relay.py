"""An engine's KV events, translated and numbered, onto the event plane; and what readers missed of them.

Per data-parallel rank: the engine's own stream comes in order (see `transport.engine_events`; `kv_poll` for
engines that are asked), what changes goes out as one batch every `GATHER_S` under the next number, the last
ones are kept for readers with a gap. When engine events are lost for good, a `Cleared` goes out and the index
is built anew from what follows. Blocks that cannot be taken over are logged once a streak: see `SkippedLog`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from dynctl.engines.base import KvReader
from dynctl.errors import CodecError
from dynctl.kv.translate import Memory, Skipped, Translator
from dynctl.protocol.kv_events import Cleared, EngineKvBatch, KvBatch, KvEvent, KvSync, KvSyncReply
from dynctl.transport.engine_events import EngineEventSource, EngineSubscriber

logger = logging.getLogger(__name__)

KEPT_BATCHES = 512
GATHER_S = 0.2
"""An engine tells of blocks at every step, and a wake-up costs a frontend more than a message: by the clocks
of their hosts all workers tell at the same moments, as far as these clocks agree.
"""


def until_told(now_s: float) -> float:
    """Seconds from a wall clock's `now_s` to when batches go out next: more than 0, at most `GATHER_S`."""
    return GATHER_S - now_s % GATHER_S


class RankMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What a relay knows of one rank, for one that goes on with the same engine. `next_batch`: of its own."""

    next_batch: int
    blocks: Memory


class SkippedLog:
    """Says once a streak that blocks are being skipped, and how many it were when the streak is over.

    A streak lasts while each look finds more that were lost or cannot be read. Partial ones are told of once:
    engines announce them in normal operation.
    """

    def __init__(self, worker: str, rank: int) -> None:
        self._who = (worker, rank)
        self._seen = Skipped()
        self._streak = False

    def look(self, now: Skipped) -> None:
        """Called now and then with the counters as they are."""
        before, self._seen = self._seen, replace(now)
        was, self._streak = self._streak, _lost(now) > _lost(before)
        if self._streak and not was:
            self._log(logging.WARNING, "kv_events.skipped")
        elif was and not self._streak:
            self._log(logging.INFO, "kv_events.skipped_no_more")
        elif now.partial and not before.partial:
            self._log(logging.INFO, "kv_events.skipped")

    def _log(self, level: int, event: str) -> None:
        text = "%s worker=%s rank=%d unknown_parent=%d malformed=%d partial=%d"
        seen = self._seen
        logger.log(level, text, event, *self._who, seen.unknown_parent, seen.malformed, seen.partial)


def _lost(skipped: Skipped) -> int:
    return skipped.unknown_parent + skipped.malformed


class RankRelay:
    """One rank's events. Pure but for `publish`, and `gathers`, which sees to it that `flush` is called."""

    def __init__(
        self,
        worker: str,
        incarnation: int,
        rank: int,
        *,
        publish: Callable[[KvBatch], None],
        gathers: Callable[[], None],
        kept: int,
    ) -> None:
        self.resets = 0
        self._gathers = gathers
        self._gathered: list[KvEvent] = []
        self._worker = worker
        self._incarnation = incarnation
        self._rank = rank
        self._publish = publish
        self._translator = Translator(rank)
        self._skipped = SkippedLog(worker, rank)
        self._told = 0
        self._next = 0
        self._kept: deque[KvBatch] = deque(maxlen=kept)
        self._quiet = False

    @property
    def block_size(self) -> int:
        """In tokens, as events show it; until they do, as the engine says; 0 = not known."""
        return self._translator.block_size or self._told

    def begin(self, block_size: int, *, again: bool) -> None:
        """An engine is there. `block_size` as it says itself, 0 = not said. `again`: not the first one."""
        self._told = block_size
        if again:
            self._translator.block_size = 0
            self.reset("the engine was away")

    def memory(self) -> Memory:
        """What is known of the engine's blocks."""
        return self._translator.memory()

    def recall(self, memory: Memory) -> None:
        """Know this from the start: whoever asks for what there was before gets a snapshot."""
        self._translator.recall(memory)
        self._next = 1

    def feed(self, batch: EngineKvBatch) -> None:
        """The engine's next batch."""
        self._send(self._translator.feed(batch))

    def reset(self, reason: str) -> None:
        """What was known is not to be relied on any more."""
        self.resets += 1
        logger.warning("kv_index.reset worker=%s rank=%d reason=%s", self._worker, self._rank, reason)
        self._translator.reset()
        self._gathered.clear()
        self._send([Cleared()])

    def beat(self) -> None:
        """Called now and then: repeats the last batch after a quiet time, so that losing it shows.

        And logs what was skipped.
        """
        self._skipped.look(self._translator.skipped)
        if self._quiet and self._kept:
            self._publish(self._kept[-1])
        self._quiet = True

    def sync(self, from_seq: int) -> KvSyncReply:
        """All batches from that number on, or the whole when they are not kept any more."""
        self.flush()
        first = self._next - len(self._kept)
        kept = first <= from_seq <= self._next
        return KvSyncReply(
            incarnation=self._incarnation,
            rank=self._rank,
            next_seq=self._next,
            batches=list(self._kept)[from_seq - first :] if kept else [],
            snapshot=None if kept else self._translator.snapshot(),
            block_size=self.block_size,
            resets=self.resets,
            shown=[] if kept else self._translator.images.known.all(),
        )

    def _send(self, events: list[KvEvent]) -> None:
        if events:
            self._gathered += events
            self._gathers()

    def flush(self) -> None:
        """Publish what has been gathered."""
        events, self._gathered = self._gathered, []
        shown = self._translator.images.take()
        if not events and not shown:
            return
        size = self.block_size
        batch = KvBatch(self._worker, self._incarnation, self._rank, self._next, events, size, shown)
        self._next += 1
        self._kept.append(batch)
        self._quiet = False
        self._publish(batch)


class KvRelay:
    """All ranks of one engine; survives it: `attach` again when it, or one in its place, is back.

    `sources`: publishers by rank. An engine that is polled (`polled`) has none, and one rank, which `take`
    feeds.
    """

    def __init__(
        self,
        worker: str,
        incarnation: int,
        sources: Sequence[EngineEventSource],
        *,
        polled: bool,
        new_reader: Callable[[], KvReader],
        publish: Callable[[KvBatch], None],
    ) -> None:
        self._incarnation = incarnation
        self._flush: asyncio.TimerHandle | None = None
        self._sources = sources
        self._new_reader = new_reader
        self._ranks = [
            RankRelay(worker, incarnation, rank, publish=publish, gathers=self._gathers, kept=KEPT_BATCHES)
            for rank in range(1 if polled else len(sources))
        ]
        self._strangers: set[int] = set()
        self._subscribers: list[EngineSubscriber] = []
        self._attached_before = False
        self._begin_at = [0] * len(self._ranks)

    def memory(self) -> list[RankMemory]:
        """What is known of the engine by now; [] when none is listened to."""
        listened = zip(self._ranks, self._subscribers, strict=False)
        return [RankMemory(next_batch=one.expected, blocks=rank.memory()) for rank, one in listened]

    def recall(self, memories: Sequence[RankMemory]) -> None:
        """Go on from there with the engine that is attached first."""
        for number, (rank, memory) in enumerate(zip(self._ranks, memories, strict=False)):
            rank.recall(memory.blocks)
            self._begin_at[number] = memory.next_batch

    def attach(self, block_size: int) -> None:
        """Listen to the engine, from all it still keeps. `block_size` as it says itself, 0 = not said."""
        for rank in self._ranks:
            rank.begin(block_size, again=self._attached_before)
        self._attached_before = True
        begin_at, self._begin_at = self._begin_at, [0] * len(self._ranks)
        for rank, source, first in zip(self._ranks, self._sources, begin_at, strict=False):
            feed = _Feed(rank, self._new_reader)
            subscriber = EngineSubscriber(source, feed.batch, feed.reset, first)
            self._subscribers.append(subscriber)
            subscriber.start()

    def _gathers(self) -> None:
        if self._flush is None:
            self._flush = asyncio.get_running_loop().call_later(until_told(time.time()), self._flush_all)

    def _flush_all(self) -> None:
        self._flush = None
        for rank in self._ranks:
            rank.flush()

    def detach(self) -> None:
        """Stop listening, and tell no more."""
        if self._flush is not None:
            self._flush.cancel()
            self._flush_all()
        for subscriber in self._subscribers:
            subscriber.close()
        self._subscribers.clear()

    def take(self, batches: Sequence[EngineKvBatch]) -> None:
        """Events that were fetched from the engine; left out: ranks that no request can be sent to."""
        for batch in batches:
            if 0 <= batch.rank < len(self._ranks):
                self._ranks[batch.rank].feed(batch)
            elif batch.rank not in self._strangers:
                self._strangers.add(batch.rank)
                logger.warning("kv_events.rank_ignored rank=%d ranks=%d", batch.rank, len(self._ranks))

    def reset(self, reason: str) -> None:
        """See `RankRelay.reset`, for all ranks."""
        for rank in self._ranks:
            rank.reset(reason)

    def beat(self) -> None:
        """See `RankRelay.beat`."""
        for rank in self._ranks:
            rank.beat()

    def sync(self, call: KvSync) -> KvSyncReply:
        """Answer a reader; a rank without events has none."""
        if not 0 <= call.rank < len(self._ranks):
            return KvSyncReply(incarnation=self._incarnation, rank=call.rank, next_seq=0)
        return self._ranks[call.rank].sync(call.from_seq)


class _Feed:
    """What one publisher sends, read and handed to its rank."""

    def __init__(self, rank: RankRelay, new_reader: Callable[[], KvReader]) -> None:
        self._rank = rank
        self._new_reader = new_reader
        self._reader = new_reader()

    def batch(self, seq: int, payload: bytes) -> None:
        try:
            batches = self._reader.read(payload, time.time())
        except CodecError as error:
            self.reset(f"batch {seq} cannot be read: {error}")
            return
        for batch in batches:
            self._rank.feed(batch)

    def reset(self, reason: str) -> None:
        self._rank.reset(reason)
        self._reader = self._new_reader()
