"""Continuous batching with chunked prefill and a token budget per step. Pure: `now_s` is passed in.

A step is decided by `begin`, takes as long as the caller's clock says, and is completed by `commit`:

    waiting → running → finished          preempted sequences go back to the front of waiting
    waiting → receiving → waiting → ...   those whose prompt KV comes from another engine
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from dynctl.mocker.blocks import ROOT_HASH, BlockPool, BlocksStored, Media, block_hash, media_keys
from dynctl.mocker.leases import Pin, PinBoard


class TokenSource(Protocol):
    """The model: gives one token after another; each depends on all tokens before it."""

    def next(self, eos_allowed: bool) -> int:
        """The next token."""
        ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One answer in the making. `tokens` is the prompt and what was said so far; `computed` of them have KV.

    `pin_digest` set: on a good end the blocks are kept for a decode engine. `remote`: the prompt's KV is to
    come from a prefill engine. `owner` belongs to the caller. `finish` is "" until the end.
    """

    id: str
    tokens: list[int]
    max_tokens: int
    source: TokenSource
    owner: Any = None
    min_tokens: int = 0
    eos: int = -1
    salt: str = ""
    adapter: str = ""
    media: tuple[Media, ...] = ()
    pin_digest: str = ""
    remote: bool = False
    prompt_len: int = 0
    arrived_s: float = 0.0
    started_s: float = 0.0
    first_token_s: float = 0.0
    last_token_s: float = 0.0
    generated: int = 0
    computed: int = 0
    cached_tokens: int = 0
    remote_tokens: int = 0
    finish: str = ""
    pinned: list[int] | None = None
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    committed: int = 0
    admitted: bool = False

    def __post_init__(self) -> None:
        self.prompt_len = len(self.tokens)


@dataclass(frozen=True, slots=True)
class Limits:
    """As vLLM's --max-num-seqs, --max-num-batched-tokens, --[no-]enable-chunked-prefill."""

    max_seqs: int
    max_batched_tokens: int
    chunked_prefill: bool = True


@dataclass(slots=True)
class Step:
    """Work of one step: tokens to compute by sequence; what a performance model needs to time it.

    `settled`: whoever waits was looked at, so that while nobody ends or comes the next step admits nobody.
    """

    work: list[tuple[Sequence, int]] = field(default_factory=list)
    prefills: list[tuple[int, int]] = field(default_factory=list)
    batch: int = 0
    context: int = 0
    settled: bool = False


Output = tuple[Sequence, int, str]
"""A sequence, its new token, and why it ended ("" = it goes on)."""


@dataclass(slots=True)
class Counters:
    """Totals since the start, as vLLM's metrics count them (in tokens where not said otherwise)."""

    prompt: int = 0
    generated: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0
    local_compute: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})


class Scheduler:
    """Decides what each step computes. One per data-parallel rank."""

    def __init__(self, limits: Limits, pool: BlockPool, pins: PinBoard) -> None:
        self.limits = limits
        self.pool = pool
        self.pins = pins
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.receiving: set[Sequence] = set()
        self.counters = Counters()
        self._transfers: list[Sequence] = []

    @property
    def unfinished(self) -> int:
        """Sequences that are not finished."""
        return len(self.waiting) + len(self.running) + len(self.receiving)

    def add(self, seq: Sequence, now_s: float) -> None:
        """Queue a sequence. Its whole length must fit into the pool."""
        seq.arrived_s = now_s
        self.waiting.append(seq)

    def begin(self, now_s: float) -> Step | None:
        """Decide the next step; None when nothing can be computed now."""
        for blocks in self.pins.expire(now_s):
            self.pool.release(blocks)
        step = Step()
        budget, preempted = self._schedule_running(step)
        if not (preempted and step.work):
            self._admit(step, budget, now_s)
            step.settled = True
        return step if step.work else None

    def commit(self, step: Step, now_s: float) -> list[Output]:
        """Complete a step: one new token for each sequence whose KV has caught up with its tokens."""
        outputs: list[Output] = []
        size = self.pool.block_size
        ended = False
        for seq, count in step.work:
            if seq.finish:
                continue
            seq.computed += count
            if seq.computed // size > seq.committed:
                self._cache_full_blocks(seq)
            if seq.computed < len(seq.tokens):
                continue
            token = seq.source.next(seq.generated >= seq.min_tokens)
            seq.tokens.append(token)
            seq.generated += 1
            reason = "stop" if token == seq.eos else "length" if seq.generated >= seq.max_tokens else ""
            outputs.append((seq, token, reason))
            if reason:
                ended = True
                self._end(seq, reason, now_s)
        self.counters.generated += len(outputs)
        if ended:
            self.running = [seq for seq in self.running if not seq.finish]
        return outputs

    def alike(self, step: Step) -> int:
        """How many steps from this one on are the same but for one token more in each sequence: until the
        first ends, or blocks run out, while nothing comes from outside. At least 1.

        For sources that never say `eos`; leases of pinned blocks are taken not to end.
        """
        work = step.work
        if not step.settled or step.prefills or len(work) != len(self.running):
            return 1
        steps = work[0][0].max_tokens
        for seq, _ in work:
            if not seq.generated or len(seq.tokens) - seq.computed != 1:
                return 1
            left = seq.max_tokens - seq.generated
            steps = left if left < steps else steps
        while steps > 1 and self._blocks_for(work, steps) > self.pool.free:
            steps //= 2
        return steps

    def repeat(self, step: Step, times: int) -> None:
        """Complete `step` and begin the next one so many times, fewer than `alike` of them."""
        size, pool = self.pool.block_size, self.pool
        for seq, _ in step.work:
            say = seq.source.next
            seq.tokens += [say(True) for _ in range(times)]
            seq.generated += times
            seq.computed += times
            missing = -(-(seq.computed + 1) // size) - len(seq.blocks)
            if missing > 0:
                seq.blocks += pool.allocate(missing) or []
            if seq.computed // size > seq.committed:
                self._cache_full_blocks(seq)
        step.context += times * step.batch
        self.counters.generated += times * step.batch

    def _blocks_for(self, work: list[tuple[Sequence, int]], steps: int) -> int:
        """Blocks to be allocated until the last of so many steps has begun."""
        size = self.pool.block_size
        return sum(max(0, -(-(seq.computed + steps) // size) - len(seq.blocks)) for seq, _ in work)

    def finish(self, seq: Sequence, reason: str, now_s: float) -> None:
        """End a sequence from outside: "abort", "error", or "stop". Harmless when it has ended."""
        if seq.finish:
            return
        if seq in self.receiving:
            self.receiving.discard(seq)
        elif seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._end(seq, reason, now_s)

    def take_transfers(self) -> list[Sequence]:
        """Sequences whose blocks are there and whose prompt KV must now be fetched."""
        transfers, self._transfers = self._transfers, []
        return transfers

    def received(self, seq: Sequence) -> None:
        """The prompt's KV has arrived. As in vLLM its last token is computed again to sample from it."""
        if seq.finish:
            return
        self.receiving.discard(seq)
        seq.remote = False
        seq.computed = seq.prompt_len - 1
        if seq.computed // self.pool.block_size > seq.committed:
            self._cache_full_blocks(seq)
        self.waiting.appendleft(seq)

    def unpin(self, request_id: str) -> None:
        """A decode engine has read a prefill's blocks, or will not."""
        self.pool.release(self.pins.release(request_id))

    def _schedule_running(self, step: Step) -> tuple[int, bool]:
        """Give each running sequence its tokens, oldest first; (budget left, whether one was preempted)."""
        budget = self.limits.max_batched_tokens
        size = self.pool.block_size
        running, work = self.running, step.work
        before = self.counters.preemptions
        i = batch = context = 0
        while i < len(running) and budget:
            seq = running[i]
            total = len(seq.tokens)
            need = total - seq.computed
            need = need if need < budget else budget
            if seq.computed + need > len(seq.blocks) * size and not self._grow(seq, need):
                continue
            if need == 1:
                batch += 1
                context += total
            else:
                step.prefills.append((seq.computed, need))
            work.append((seq, need))
            budget -= need
            i += 1
        step.batch = batch
        step.context = context
        return budget, self.counters.preemptions != before

    def _grow(self, seq: Sequence, need: int) -> bool:
        """Blocks for `need` more tokens, preempting the youngest for them; False: that was `seq`."""
        size = self.pool.block_size
        missing = -(-(seq.computed + need) // size) - len(seq.blocks)
        while (blocks := self.pool.allocate(missing)) is None:
            victim = self.running.pop()
            self.pool.release(victim.blocks)
            victim.blocks = []
            victim.computed = victim.committed = 0
            self.counters.preemptions += 1
            self.waiting.appendleft(victim)
            if victim is seq:
                return False
        seq.blocks += blocks
        return True

    def _admit(self, step: Step, budget: int, now_s: float) -> None:
        """Take from the queue while tokens, seats and blocks last, first come first served."""
        while self.waiting and budget and len(self.running) < self.limits.max_seqs:
            seq = self.waiting[0]
            if not seq.blocks and not self._place(seq, budget, now_s):
                return
            self.waiting.popleft()
            if seq.remote:
                self.receiving.add(seq)
                self._transfers.append(seq)
                continue
            need = min(len(seq.tokens) - seq.computed, budget)
            self.running.append(seq)
            step.work.append((seq, need))
            if need == 1:
                step.batch += 1
                step.context += len(seq.tokens)
            else:
                step.prefills.append((seq.computed, need))
            budget -= need

    def _place(self, seq: Sequence, budget: int, now_s: float) -> bool:
        """Give a waiting sequence its first blocks, cached ones first; False when it has to wait."""
        pool = self.pool
        size = pool.block_size
        total = len(seq.tokens)
        if pool.caching:
            self._hash_until(seq, total // size)
        matched = pool.match(seq.hashes[: (total - 1) // size])
        computed = len(matched) * size
        target = total if seq.remote else min(total, computed + budget)
        if target < total and not self.limits.chunked_prefill and budget < self.limits.max_batched_tokens:
            return False
        missing = -(-target // size) - len(matched)
        if pool.free - pool.idle(matched) < missing:
            return False
        pool.acquire(matched)
        seq.blocks = matched + (pool.allocate(missing) or [])
        seq.computed = computed
        seq.committed = len(matched)
        if not seq.admitted:
            self._count_admission(seq, computed, now_s)
        return True

    def _count_admission(self, seq: Sequence, cached: int, now_s: float) -> None:
        counters = self.counters
        seq.admitted = True
        seq.started_s = now_s
        seq.cached_tokens = cached
        counters.prompt += seq.prompt_len
        counters.prefix_queries += seq.prompt_len
        counters.prefix_hits += cached
        if seq.remote:
            seq.remote_tokens = seq.prompt_len - cached
            counters.external_queries += seq.remote_tokens
            counters.external_hits += seq.remote_tokens
        else:
            counters.local_compute += seq.prompt_len - cached

    def _hash_until(self, seq: Sequence, blocks: int) -> None:
        """Extend the chain of hashes to the first `blocks` full blocks."""
        size = self.pool.block_size
        hashes = seq.hashes
        for i in range(len(hashes), blocks):
            parent = hashes[-1] if hashes else ROOT_HASH
            tokens = tuple(seq.tokens[i * size : (i + 1) * size])
            media = media_keys(seq.media, i * size, (i + 1) * size) if seq.media else ()
            hashes.append(block_hash(parent, tokens, "" if hashes else seq.salt, seq.adapter, media))

    def _cache_full_blocks(self, seq: Sequence) -> None:
        """Make the blocks that have become full findable."""
        size = self.pool.block_size
        first, full = seq.committed, seq.computed // size
        seq.committed = full
        if not self.pool.caching:
            return
        self._hash_until(seq, full)
        chain = BlocksStored(
            hashes=seq.hashes[first:full],
            parent=seq.hashes[first - 1] if first else None,
            tokens=seq.tokens[first * size : full * size],
            salt="" if first else seq.salt,
            adapter=seq.adapter,
            media=tuple(media_keys(seq.media, i * size, (i + 1) * size) for i in range(first, full))
            if seq.media
            else (),
        )
        self.pool.commit(seq.blocks[first:full], chain)

    def _end(self, seq: Sequence, reason: str, now_s: float) -> None:
        seq.finish = reason
        self.counters.finished[reason] += 1
        if seq.pin_digest and reason in ("stop", "length"):
            seq.pinned = list(seq.blocks)
            deadline = now_s + self.pins.lease_s
            self.pins.add(seq.id, Pin(seq.blocks, seq.prompt_len, seq.pin_digest, deadline))
        else:
            self.pool.release(seq.blocks)
        seq.blocks = []
