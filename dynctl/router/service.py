"""The router of one frontend: who may be chosen, what each holds and has to do, and which one to take.

Owns one task per followed (worker, rank) that asks it for missed KV batches, and one that tidies the index.
Choosing is synchronous and awaits nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from random import Random

from dynctl.errors import DynctlError, Rejected
from dynctl.kv.index import Index, SlotKey
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC, KvBatch, KvSync, KvSyncReply, LoadReport
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import RankLoad, Ticket
from dynctl.router.indexer import Indexer, StreamState
from dynctl.router.policy import Candidate, RouteRequest, policy
from dynctl.router.shared import SharedBlocks

__all__ = ["Choice", "RouteRequest", "Router", "SyncTiming", "Ticket", "WorkerLinks"]

logger = logging.getLogger(__name__)

SyncCall = Callable[[Instance, KvSync], Awaitable[KvSyncReply]]
"""Asks one worker over its control endpoint. May raise DynctlError; is cancelled at the deadline."""

FALLBACK_BLOCK_TOKENS = 16
"""The unit of load, in tokens, while no worker has told its block size."""

SWEEP_BITS = 200
"""Index entries tidied between two turns of the event loop: about 0.2 ms."""

_INDEXED = ("prefill", "aggregated")
"""Roles whose cached blocks matter: decode alone gets its KV from prefill, whatever it holds."""


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
class Choice:
    """Where a request goes. The caller must call `ticket.finish()` when the request is over, however it ends.

    `overlap_blocks`: blocks of the prompt cached there. `candidates`: how many (worker, rank) there were.
    """

    instance: Instance
    rank: int
    overlap_blocks: int
    candidates: int
    ticket: Ticket


@dataclass(frozen=True, slots=True)
class WorkerLinks:
    """The router's ends to the workers, given by whoever owns the sockets.

    `sync` asks one worker for KV batches. `subscribe`/`unsubscribe` attach and detach the event-plane
    endpoint of a worker; its messages on `Router.topics` are to be handed to `Router.on_kv` and
    `Router.on_load`.
    """

    sync: SyncCall
    subscribe: Callable[[str], None]
    unsubscribe: Callable[[str], None]


@dataclass(slots=True)
class _Worker:
    member: Member
    loads: list[RankLoad]


@dataclass(frozen=True, slots=True)
class _Follower:
    """The task that keeps one (worker, rank) synced; `wake` tells it of a gap."""

    task: asyncio.Task[None]
    wake: asyncio.Event


class Router:
    """Chooses workers for requests. Use from one event loop; `close` ends its tasks.

    `block_size` in tokens is what prompts must be hashed with: the workers' own, else the one given; 0 = not
    known yet.
    """

    def __init__(
        self,
        spec: RouterSpec,
        links: WorkerLinks,
        *,
        block_size: int = 0,
        rng: Random | None = None,
        timing: SyncTiming = DEFAULT_TIMING,
    ) -> None:
        self._links = links
        self._timing = timing
        self._given_block_size = self.block_size = block_size
        self._index = Index()
        self._indexer = Indexer(self._index)
        self._shared = SharedBlocks()
        self._policy = policy(spec, self._index, self._shared, rng or Random())
        self._kv = spec.mode == "kv"
        self._workers: dict[str, _Worker] = {}
        self._candidates: dict[str, list[Candidate]] = {}
        self._block_sizes: dict[str, int] = {}
        self._followers: dict[SlotKey, _Follower] = {}
        self._tidying: asyncio.Task[None] | None = None

    @property
    def topics(self) -> tuple[bytes, ...]:
        """What to subscribe to: KV events only where they are used."""
        return (KV_TOPIC, LOAD_TOPIC) if self._kv else (LOAD_TOPIC,)

    def choose(self, request: RouteRequest) -> Choice:
        """Choose a worker and count the request into its load. Raises Rejected when there is none."""
        candidates = self._candidates.get(request.role, [])
        if request.exclude:
            candidates = [one for one in candidates if one.instance.id not in request.exclude]
        if not candidates:
            raise self._nobody(request)
        picked = self._policy.pick(request, candidates, self.block_size or FALLBACK_BLOCK_TOKENS)
        chosen = picked.candidate
        ticket = chosen.load.add(picked.footprint)
        return Choice(chosen.instance, chosen.key[1], picked.overlap, len(candidates), ticket)

    def _nobody(self, request: RouteRequest) -> Rejected:
        there = self._of_role(request.role)
        ready = [member for member in there if member.state == "ready"]
        if ready:
            message = f"no further worker of role {request.role} to try: all {len(ready)} failed this request"
        elif there:
            message = f"no worker of role {request.role} is ready: all {len(there)} are draining"
        else:
            message = f"no worker of role {request.role} is registered"
        return Rejected(message, hint="try again later")

    def ready(self, roles_needed: Mapping[str, int]) -> list[str]:
        """Why requests cannot be served, in words; [] = they can.

        `roles_needed`: replicas wanted by role. A role of which none is ready is a reason, a role that is
        only short of some is not.
        """
        reasons = []
        for role, wanted in roles_needed.items():
            there = self._of_role(role)
            draining = sum(member.state == "draining" for member in there)
            if wanted > 0 and len(there) == draining:
                also = f" ({draining} draining)" if draining else ""
                reasons.append(f"{role}: 0 of {wanted} ready{also}")
        return reasons

    def _of_role(self, role: str) -> list[Member]:
        members = (worker.member for worker in self._workers.values())
        return [member for member in members if member.instance.role == role]

    def members_changed(self, upserts: Iterable[Member], removed: Iterable[str]) -> None:
        """Take over a change of the membership. Frontends and older incarnations are passed over."""
        for worker_id in removed:
            self._drop(worker_id)
        for member in upserts:
            if member.instance.role != "frontend":
                self._upsert(member)
        self._rebuild()

    def _upsert(self, member: Member) -> None:
        instance = member.instance
        known = self._workers.get(instance.id)
        if known is not None:
            before = known.member.instance.incarnation
            if instance.incarnation < before:
                return
            if instance.incarnation == before:
                known.member = member
                return
            self._detach(instance.id)
        ranks = max(1, instance.dp_size)
        self._workers[instance.id] = _Worker(member, [RankLoad(self._shared) for _ in range(ranks)])
        if instance.events:
            self._links.subscribe(instance.events)
        if instance.role in _INDEXED:
            self._block_sizes[instance.id] = instance.model.block_size if instance.model else 0
            if self._kv and _tells_of_its_cache(instance):
                for sync in self._indexer.join(instance.id, instance.incarnation, ranks):
                    self._follow(instance, sync.rank)
        self._tidy()

    def _drop(self, worker_id: str) -> None:
        """A worker is gone, and all it held with it."""
        if worker_id in self._workers:
            self._detach(worker_id)
            self._indexer.leave(worker_id)
            self._tidy()

    def _detach(self, worker_id: str) -> None:
        """End what runs for the known incarnation of a worker. Its tickets end with its loads."""
        worker = self._workers.pop(worker_id)
        self._block_sizes.pop(worker_id, None)
        for load in worker.loads:
            load.retire()
        instance = worker.member.instance
        if instance.events:
            self._links.unsubscribe(instance.events)
        for key in [key for key in self._followers if key[0] == worker_id]:
            self._followers.pop(key).task.cancel()

    def _rebuild(self) -> None:
        """Work out anew what depends on the membership as a whole."""
        candidates: dict[str, list[Candidate]] = {}
        for worker_id, worker in sorted(self._workers.items()):
            instance = worker.member.instance
            if worker.member.state == "ready":
                candidates.setdefault(instance.role, []).extend(
                    Candidate((worker_id, rank), instance, load) for rank, load in enumerate(worker.loads)
                )
        self._candidates = candidates
        self._settle_block_size()

    def _learn_block_size(self, worker_id: str, size: int) -> None:
        """A worker's events tell its block size in tokens (0 = they do not)."""
        if size and self._block_sizes.get(worker_id, size) != size:
            self._block_sizes[worker_id] = size
            self._settle_block_size()

    def _settle_block_size(self) -> None:
        """Of the sizes known that of the first worker by name; prompts are hashed in one size only."""
        sizes = [size for _, size in sorted(self._block_sizes.items()) if size]
        self.block_size = sizes[0] if sizes else self._given_block_size

    def on_kv(self, batch: KvBatch) -> None:
        """Take one message of topic KV_TOPIC."""
        sync = self._indexer.on_batch(batch)
        self._learn_block_size(batch.worker, batch.block_size)
        self._tidy()
        if sync is None:
            return
        logger.warning(
            "index.gap worker=%s rank=%s missing=%s..%s", sync.worker, sync.rank, sync.from_seq, batch.seq - 1
        )
        follower = self._followers.get((sync.worker, sync.rank))
        if follower is None or follower.task.done():
            self._follow(self._workers[sync.worker].member.instance, sync.rank)
        else:
            follower.wake.set()

    def on_load(self, report: LoadReport) -> None:
        """Take one message of topic LOAD_TOPIC; reports of others than the known incarnations are ignored."""
        worker = self._workers.get(report.worker)
        if (
            worker is not None
            and worker.member.instance.incarnation == report.incarnation
            and 0 <= report.rank < len(worker.loads)
        ):
            worker.loads[report.rank].report(report)

    def streams(self) -> list[StreamState]:
        """How well each (worker, rank) that is indexed is followed."""
        return self._indexer.states()

    def held(self) -> dict[SlotKey, int]:
        """Blocks indexed, by (worker, rank)."""
        return self._index.stats()

    def loads(self) -> dict[SlotKey, RankLoad]:
        """The load of each (worker, rank). To be read only."""
        return {
            (worker_id, rank): load
            for worker_id, worker in self._workers.items()
            for rank, load in enumerate(worker.loads)
        }

    def doubts(self) -> list[str]:
        """What keeps choices from being as good as they could be, in words."""
        words = [
            f"{state.worker} rank {state.rank}: its KV index is being synced ({state.pending} batches wait)"
            for state in self.streams()
            if state.state == "syncing"
        ]
        for worker_id, size in sorted(self._block_sizes.items()) if self._kv else ():
            if not _tells_of_its_cache(self._workers[worker_id].member.instance):
                words.append(f"{worker_id}: it publishes no KV events, so none of its cached blocks are seen")
            elif size not in (0, self.block_size):
                words.append(
                    f"{worker_id}: its block size is {size} tokens, not {self.block_size}, "
                    "so none of its cached blocks are seen"
                )
        return words

    def _follow(self, instance: Instance, rank: int) -> None:
        wake = asyncio.Event()
        name = f"router.follow {instance.id} {rank}"
        task = _start(self._keep_synced(instance, rank, wake), name)
        self._followers[instance.id, rank] = _Follower(task, wake)

    async def _keep_synced(self, instance: Instance, rank: int, wake: asyncio.Event) -> None:
        """Ask for what is missing until nothing is, and again after a gap, until the worker is gone."""
        timing, index = self._timing, self._indexer
        pause, delay, failures = timing.settle_s, timing.retry_s, 0
        while (
            state := index.state(instance.id, rank)
        ) is not None and state.incarnation == instance.incarnation:
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
                reply = await self._links.sync(instance, KvSync(rank=rank, from_seq=from_seq))
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
        self._learn_block_size(instance.id, reply.block_size)
        state = self._indexer.state(instance.id, rank)
        if state is not None and state.state == "syncing":
            return f"the answer goes up to batch {reply.next_seq}, wanted from {state.next_seq} on"
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


def _tells_of_its_cache(instance: Instance) -> bool:
    """Whether KV events come from it, and it can be asked for those that were missed."""
    return bool(instance.events and instance.control)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    """Until `event` is set, or `timeout_s` have passed."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
