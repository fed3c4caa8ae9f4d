"""Keeps the index true to the workers: one task per followed (worker, rank) asks for what was missed.

`router.indexer` decides what to ask for; here are the calls, with deadline and retry, and the tidying of the
index between two turns of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass

from dynctl.errors import DynctlError
from dynctl.kv.index import Index, SlotKey
from dynctl.kv.media import Layouts
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KvBatch, KvSync, KvSyncReply
from dynctl.router.indexer import Indexer, StreamState

logger = logging.getLogger(__name__)

SyncCall = Callable[[Instance, KvSync], Awaitable[KvSyncReply]]
"""Asks one worker over its control endpoint. May raise DynctlError; is cancelled at the deadline."""

SWEEP_BITS = 200
"""Index entries tidied between two turns of the event loop: about 0.2 ms."""


@dataclass(frozen=True, slots=True)
class SyncTiming:
    """Deadline of one call; wait between failed calls (doubling up to a limit); wait before the next look.

    A lost batch shows by the one after it. `settle_s` after the first answer and every `recheck_s` a worker
    is asked anyway: a subscription may have become live only after the first answer, and the last batch
    before a pause has none after it.
    """

    deadline_s: float = 5.0
    retry_s: float = 0.2
    retry_limit_s: float = 5.0
    settle_s: float = 1.0
    recheck_s: float = 30.0


DEFAULT_TIMING = SyncTiming()


@dataclass(frozen=True, slots=True)
class _Follower:
    """The task that keeps one (worker, rank) synced; `wake` tells it of a gap."""

    task: asyncio.Task[None]
    wake: asyncio.Event


class Following:
    """The workers whose KV events are followed. Use from one event loop; `close` ends its tasks.

    `learn` is told the block size in tokens that a worker's events show, with each message (0 = not shown).
    """

    def __init__(
        self,
        index: Index,
        layouts: Layouts,
        sync: SyncCall,
        learn: Callable[[str, int], None],
        timing: SyncTiming,
    ) -> None:
        self._index = index
        self._indexer = Indexer(index, layouts)
        self._sync = sync
        self._learn = learn
        self._timing = timing
        self._instances: dict[str, Instance] = {}
        self._followers: dict[SlotKey, _Follower] = {}
        self._tidying: asyncio.Task[None] | None = None
        self._moved = asyncio.Event()

    def join(self, instance: Instance, ranks: int) -> None:
        """Follow all ranks of a worker, from its first batch on. An older incarnation must `leave` before."""
        self._instances[instance.id] = instance
        for sync in self._indexer.join(instance.id, instance.incarnation, ranks):
            self._follow(instance, sync.rank)

    def leave(self, worker_id: str) -> None:
        """Forget a worker, if it is followed, and all it held."""
        if self._instances.pop(worker_id, None) is not None:
            for key in [key for key in self._followers if key[0] == worker_id]:
                self._followers.pop(key).task.cancel()
            self._indexer.leave(worker_id)
            self._moved.set()
            self._tidy()

    def on_batch(self, batch: KvBatch) -> None:
        """Take one published batch."""
        sync = self._indexer.on_batch(batch)
        self._learn(batch.worker, batch.block_size)
        self._tidy()
        if sync is None:
            return
        logger.warning(
            "index.gap worker=%s rank=%s expected=%s got=%s", sync.worker, sync.rank, sync.from_seq, batch.seq
        )
        follower = self._followers.get((sync.worker, sync.rank))
        if follower is None or follower.task.done():
            self._follow(self._instances[sync.worker], sync.rank)
        else:
            follower.wake.set()

    async def moved(self) -> None:
        """Wait until one more (worker, rank) is synced, or gone."""
        self._moved.clear()
        await self._moved.wait()

    def states(self) -> list[StreamState]:
        """How well each (worker, rank) is followed."""
        return self._indexer.states()

    def _follow(self, instance: Instance, rank: int) -> None:
        wake = asyncio.Event()
        task = _start(self._keep_synced(instance, rank, wake), f"router.follow {instance.id} {rank}")
        self._followers[instance.id, rank] = _Follower(task, wake)

    async def _keep_synced(self, instance: Instance, rank: int, wake: asyncio.Event) -> None:
        """Ask for what is missing until nothing is, and again after a gap, until the worker is gone."""
        timing, index = self._timing, self._indexer
        pause, delay, failures = timing.settle_s, timing.retry_s, 0
        while True:
            state = index.state(instance.id, rank)
            if state is None:
                return
            wake.clear()
            problem = await self._ask(instance, rank, state.next_seq)
            if problem:
                failures += 1
                level = logging.WARNING if failures == 1 else logging.DEBUG
                logger.log(level, "index.sync_failed worker=%s rank=%s: %s", instance.id, rank, problem)
                await asyncio.sleep(delay)
                delay = min(2 * delay, timing.retry_limit_s)
                continue
            if failures:
                logger.info("index.synced worker=%s rank=%s failures=%s", instance.id, rank, failures)
            delay, failures = timing.retry_s, 0
            await _wait(wake, pause)
            pause = timing.recheck_s

    async def _ask(self, instance: Instance, rank: int, from_seq: int) -> str:
        """One call and its answer taken over. Returns what went wrong, "" = the stream is synced now."""
        try:
            async with asyncio.timeout(self._timing.deadline_s):
                reply = await self._sync(instance, KvSync(rank=rank, from_seq=from_seq))
        except TimeoutError:
            return f"no answer in {self._timing.deadline_s:g} s"
        except DynctlError as error:
            return str(error)
        self._indexer.on_reply(instance.id, reply)
        more = True
        while more:
            more = self._indexer.load(instance.id, rank)
            await asyncio.sleep(0)
        self._tidy()
        self._learn(instance.id, reply.block_size)
        state = self._indexer.state(instance.id, rank)
        if state is not None and state.state == "syncing":
            return f"the answer goes up to batch {reply.next_seq}, wanted from {state.next_seq} on"
        self._moved.set()
        return ""

    def _tidy(self) -> None:
        """See to it that retired index entries are cleared, in portions."""
        if self._index.dirty and (self._tidying is None or self._tidying.done()):
            self._tidying = _start(self._sweep(), "router.tidy")

    async def _sweep(self) -> None:
        more = True
        while more:
            more = self._index.sweep(SWEEP_BITS)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """End all tasks."""
        tasks = [follower.task for follower in self._followers.values()]
        if self._tidying is not None:
            tasks.append(self._tidying)
        self._followers.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
    """A task whose unforeseen end is logged: nobody awaits it, so the error would vanish."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logger.error("router.task_failed task=%s", task.get_name(), exc_info=error)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until `event` is set, or `timeout_s` have passed."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
