"""The router of one frontend: who may be chosen, what each holds and has to do, and which one to take.

Choosing is synchronous and awaits nothing; the tasks that keep the index true are in `router.follow`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from dynctl.kv.hashing import OF_BYTES
from dynctl.kv.index import Index, SlotKey
from dynctl.kv.media import Layouts
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC, KvBatch, KvEvent, LoadReport
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import RankLoad
from dynctl.router.affinity import Sessions
from dynctl.router.approximate import Keeping, Recent, guessed, keeping
from dynctl.router.conditional import reads_itself, spills
from dynctl.router.eligible import eligible, states
from dynctl.router.follow import DEFAULT_TIMING, Following, SyncCall, SyncTiming
from dynctl.router.indexer import StreamState
from dynctl.router.kv_aware import Knowledge
from dynctl.router.peers import Peers
from dynctl.router.policy import policy
from dynctl.router.request import Candidate, Choice, Preview, RouteRequest
from dynctl.router.shared import SharedBlocks

FALLBACK_BLOCK_TOKENS = 16
"""The unit of load, in tokens, while no worker has told its block size."""

_INDEXED = ("prefill", "aggregated")
"""Roles whose cached blocks matter: decode alone gets its KV from prefill, whatever it holds."""


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
    """`memories`: places in `Recent`, by rank, where its past prompts are remembered, if they are at all;
    `likenesses`: the same for prompts of which only the bytes are known.
    """

    member: Member
    loads: list[RankLoad]
    memories: list[int]
    likenesses: list[int]

    @property
    def tells(self) -> bool:
        """Whether KV events come from it, and it can be asked for those that were missed."""
        instance = self.member.instance
        return bool(instance.kv_events and instance.events and instance.control)


class Router:
    """Chooses workers for requests. Use from one event loop; `close` ends its tasks.

    `peers` is for whoever connects this frontend with others.

    `compares_prompts`: hashes of prompts, or of their bytes, are of use to it. `spills`: prompts need not
    wait for prefill workers that are all busy, where decode workers can read them.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spec = spec
        self._links = links
        self._clock = clock
        self._given_block_size = self.block_size = block_size
        self._index = Index(spec.index_blocks)
        self.layouts = Layouts()
        self._following = Following(self._index, self.layouts, links.sync, self._learn_block_size, timing)
        self._shared = SharedBlocks()
        self.peers = Peers()
        self._recent = Recent(spec.index_blocks)
        known = Knowledge(self._index, self._shared, self._recent, clock)
        self._policy = policy(spec, known, rng or Random())
        self._sessions = Sessions(spec.session_affinity)
        self._kv = spec.mode == "kv"
        self.compares_prompts = self._kv or spec.mode == "consistent_hash"
        self._conditional = self._kv and spec.conditional_disagg.mode != "off"
        self.spills = self._kv and spills(spec.conditional_disagg)
        self._workers: dict[str, _Worker] = {}
        self._gone: set[tuple[str, str]] = set()
        self._candidates: dict[str, list[Candidate]] = {}
        self._block_sizes: dict[str, int] = {}
        self.on_freed: Callable[[], None] | None = None
        """Called when a worker may have less to do, or there is another one."""

    @property
    def topics(self) -> tuple[bytes, ...]:
        """What to subscribe to: KV events only where they are used."""
        return (KV_TOPIC, LOAD_TOPIC) if self._kv and self._spec.events != "approximate" else (LOAD_TOPIC,)

    def choose(self, request: RouteRequest) -> Choice:
        """Choose a worker and count the request into its load.

        Raises Rejected when there is none, RequestError when the client asks for one that does not exist.
        """
        now = self._clock()
        candidates = self._among(request, now)
        picked = self._policy.pick(request, candidates, self.block_size or FALLBACK_BLOCK_TOKENS)
        self._policy.took(request, picked)
        chosen = picked.candidate
        self._sessions.note(request.role, request.session, chosen.key, now)
        ticket = chosen.load.add(picked.footprint, now)
        return Choice(
            chosen.instance, chosen.key[1], picked.overlap, len(candidates), ticket, picked.best_overlap
        )

    def preview(self, request: RouteRequest) -> list[Preview]:
        """All that `choose` would see, and whom it would choose; nothing is counted. Raises as it does."""
        candidates = self._among(request, self._clock())
        size = self.block_size or FALLBACK_BLOCK_TOKENS
        weighed = self._policy.weigh(request, candidates, size)
        chosen = self._policy.pick(request, candidates, size).candidate
        return [
            Preview(
                *one.key,
                one is chosen,
                round(weighed.prices[i], 3),
                weighed.overlaps[i],
                one.load.requests,
                one.load.prefill_tokens,
                one.load.blocks,
                weighed.barred is not None and weighed.barred[i],
            )
            for i, one in enumerate(candidates)
        ]

    def end_session(self, session: str) -> None:
        """No further request of the session comes."""
        self._sessions.end(session)

    @property
    def lacks_prefill(self) -> bool:
        """Whether decode workers have to compute prompts, as there is no prefill worker to do it."""
        return not (self._spec.enforce_disagg or self._candidates.get("prefill"))

    def skips_prefill(self, request: RouteRequest, *, full: bool = False) -> bool:
        """Whether decode is better off to compute this prompt itself (see `router.conditional`).

        `request` is the decode leg's; `full`: it would have to wait for any prefill worker.
        """
        if self.lacks_prefill:
            return True
        if not self._conditional or not request.prompt_tokens:
            return False
        decode = self._candidates.get("decode", [])
        held = self._index.match(request.hashes or (), [one.key for one in decode])
        cached = max(held.values(), default=0) * self.block_size
        queue = min((one.load.prefill_tokens for one in self._candidates.get("prefill", [])), default=0)
        spec = self._spec.conditional_disagg
        return reads_itself(spec, request.prompt_tokens, cached, queue, full=full)

    def _among(self, request: RouteRequest, now_s: float) -> Sequence[Candidate]:
        candidates = self._candidates.get(request.role, [])
        if request.exclude or request.pinned or request.pinned_rank is not None or not candidates:
            there = self._of_role(request.role)
            candidates = list(eligible(request, candidates, there, self._gone))
        if not request.session:
            return candidates
        self._sessions.several = self.peers.begun
        return self._sessions.narrowed(request, candidates, self._spec.guard, now_s)

    def ready(self, roles_needed: Mapping[str, int]) -> list[str]:
        """Why requests cannot be served, in words; [] = they can.

        `roles_needed`: replicas wanted by role. A role of which none is ready is a reason, a role that is
        only short of some is not.
        """
        reasons = []
        for role, wanted in roles_needed.items():
            there = self._of_role(role)
            if wanted > 0 and not any(member.state == "ready" for member in there):
                also = f" ({len(there)} {states(there)})" if there else ""
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
        self._freed()

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
            self._drop(instance.id)
        ranks = max(1, instance.dp_size)
        loads = [RankLoad(self._shared) for _ in range(ranks)]
        worker = _Worker(member, loads, [], [])
        for load in loads:
            load.on_freed = self._freed
            load.batch_tokens = instance.model.max_batched_tokens if instance.model else 0
        self._workers[instance.id] = worker
        self.peers.attach(instance.id, instance.incarnation, loads)
        if instance.events:
            self._links.subscribe(instance.events)
        if instance.role in _INDEXED or (self._conditional and instance.role == "decode"):
            self._block_sizes[instance.id] = instance.model.block_size if instance.model else 0
            if self._kv:
                self._remember(worker)
                if worker.tells and self._spec.events != "approximate":
                    self._following.join(instance, ranks)

    def _remember(self, worker: _Worker) -> None:
        """Have the prompts it computes remembered, for as long as its events do not tell of them."""
        how = keeping(self._spec, worker.tells, 0)
        for load in worker.loads:
            likeness = self._recent.open(Keeping(self._spec.approximate_ttl_s))
            worker.likenesses.append(likeness)
            memory = -1
            if how.ttl_s:
                memory = self._recent.open(how)
                worker.memories.append(memory)
            load.on_computed = partial(self._computed, memory, likeness)

    def _computed(self, memory: int, likeness: int, hashes: Sequence[int], since_s: float) -> None:
        place = likeness if hashes and hashes[-1] >= OF_BYTES else memory
        self._recent.remember(place, hashes, since_s, self._clock())

    def _drop(self, worker_id: str) -> None:
        """The known incarnation of a worker is gone, with all it held. Running tickets stay valid."""
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return
        self._gone.add((worker.member.instance.role, worker_id))
        self.peers.detach(worker_id, worker.member.instance.incarnation)
        for load in worker.loads:
            load.on_computed = None  # its places below may soon be another's
            load.retire()
        for memory in (*worker.memories, *worker.likenesses):
            self._recent.close(memory)
        if worker.member.instance.events:
            self._links.unsubscribe(worker.member.instance.events)
        self._block_sizes.pop(worker_id, None)
        self._following.leave(worker_id)
        self._index.remove_worker(worker_id)

    def _rebuild(self) -> None:
        """Work out anew what depends on the membership as a whole."""
        candidates: dict[str, list[Candidate]] = {}
        for worker_id, worker in sorted(self._workers.items()):
            instance = worker.member.instance
            if worker.member.state == "ready":
                nowhere = [-1] * len(worker.loads)
                memories, likenesses = worker.memories or nowhere, worker.likenesses or nowhere
                candidates.setdefault(instance.role, []).extend(
                    Candidate((worker_id, rank), instance, load, memories[rank], likenesses[rank])
                    for rank, load in enumerate(worker.loads)
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
        self._following.on_batch(batch)

    def holds(self, worker: str, rank: int, event: KvEvent) -> None:
        """Take one KV event of a worker without an event plane; they must come whole and in order."""
        if worker in self._block_sizes:
            self._index.apply((worker, rank), event)

    def on_load(self, report: LoadReport) -> None:
        """Take one message of topic LOAD_TOPIC; reports of others than the known incarnations are ignored."""
        worker = self._workers.get(report.worker)
        if (
            worker is not None
            and worker.member.instance.incarnation == report.incarnation
            and 0 <= report.rank < len(worker.loads)
        ):
            load = worker.loads[report.rank]
            if worker.memories and report.kv_blocks != load.capacity:
                how = keeping(self._spec, worker.tells, report.kv_blocks)
                self._recent.keep(worker.memories[report.rank], how)
            load.report(report)

    def eligible(self, role: str) -> list[Candidate]:
        """The (worker, rank)s of `role` that may be chosen. To be read only."""
        return self._candidates.get(role, [])

    def cached_tokens(self, hashes: Sequence[int]) -> int:
        """The most tokens of a prompt with these hashes that any worker is known to hold."""
        held = self._index.match(hashes) if hashes else {}
        return max(held.values(), default=0) * self.block_size

    def _freed(self) -> None:
        if self.on_freed is not None:
            self.on_freed()

    def streams(self) -> list[StreamState]:
        """How well each (worker, rank) that is indexed is followed."""
        return self._following.states()

    async def caught_up(self, deadline_s: float) -> list[SlotKey]:
        """Wait until what the ready workers hold is known; of whom it is not when the deadline passed."""
        try:
            async with asyncio.timeout(deadline_s):
                while self._behind():
                    await self._following.moved()
        except TimeoutError:
            pass
        return self._behind()

    def _behind(self) -> list[SlotKey]:
        """The (worker, rank) pairs that may be chosen though their index is not synced."""
        ready = {worker_id for worker_id, worker in self._workers.items() if worker.member.state == "ready"}
        streams = self.streams()
        return [(s.worker, s.rank) for s in streams if s.state == "syncing" and s.worker in ready]

    def held(self) -> dict[SlotKey, int]:
        """Blocks indexed, by (worker, rank)."""
        return self._index.stats()

    @property
    def index_blocks(self) -> int:
        """Different blocks indexed, over all workers and tiers."""
        return len(self._index)

    @property
    def index_evicted(self) -> int:
        """Blocks forgotten because the index was full."""
        return self._index.evicted

    def guessed(self) -> list[str]:
        """The workers of which it is guessed what they have cached."""
        return [
            worker_id
            for worker_id, worker in self._workers.items()
            if self._kv and worker_id in self._block_sizes and guessed(self._spec, worker.tells)
        ]

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
            tells = self._workers[worker_id].tells
            if not tells and guessed(self._spec, tells):
                words.append(f"{worker_id}: it publishes no KV events: what it has cached is guessed")
            elif not tells:
                words.append(f"{worker_id}: it publishes no KV events, so none of its cached blocks are seen")
            elif size not in (0, self.block_size):
                words.append(
                    f"{worker_id}: its block size is {size} tokens, not {self.block_size}, "
                    "so none of its cached blocks are seen"
                )
        return words

    async def close(self) -> None:
        """End all tasks."""
        await self._following.close()
