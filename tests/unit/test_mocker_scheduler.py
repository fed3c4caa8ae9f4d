"""Continuous batching: budgets, chunks, prefix hits, preemption, hand-over of KV."""

from __future__ import annotations

from collections.abc import Sequence as Items

import pytest

from dynctl.mocker.blocks import BlockPool
from dynctl.mocker.leases import PinBoard
from dynctl.mocker.scheduler import Limits, Output, Scheduler, Sequence, Step

EOS = 999


class Counting:
    """Says 100, 101, ...; the end-of-answer token at place `eos_at`, as soon as it is allowed."""

    def __init__(self, eos_at: int = -1) -> None:
        self.count = 0
        self.eos_at = eos_at

    def next(self, eos_allowed: bool) -> int:
        self.count += 1
        if eos_allowed and 0 <= self.eos_at < self.count:
            return EOS
        return 99 + self.count


def make(
    blocks: int = 64,
    size: int = 4,
    seqs: int = 8,
    tokens: int = 64,
    chunked: bool = True,
    caching: bool = True,
) -> Scheduler:
    pool = BlockPool(blocks, size, caching)
    return Scheduler(Limits(seqs, tokens, chunked), pool, PinBoard(lease_s=30.0))


def ask(prompt: Items[int] | int, limit: int = 4, **given: object) -> Sequence:
    tokens = list(range(prompt)) if isinstance(prompt, int) else list(prompt)
    given.setdefault("source", Counting())
    return Sequence(id=f"s{len(tokens)}", tokens=tokens, max_tokens=limit, **given)  # type: ignore[arg-type]


def step(scheduler: Scheduler, now: float = 0.0) -> tuple[Step, list[Output]]:
    begun = scheduler.begin(now)
    assert begun is not None
    return begun, scheduler.commit(begun, now)


def finish_all(scheduler: Scheduler, most: int = 500) -> int:
    """Steps until nothing is left."""
    for count in range(most):
        if not scheduler.unfinished:
            return count
        step(scheduler, float(count))
    pytest.fail(f"{scheduler.unfinished} sequences unfinished after {most} steps")


def test_the_prompt_is_read_and_then_one_token_a_step_is_said() -> None:
    scheduler = make()
    seq = ask(10, limit=3)
    scheduler.add(seq, 0.0)
    begun, outputs = step(scheduler)
    assert begun.prefills == [(0, 10)]
    assert outputs == [(seq, 100, "")]
    begun, outputs = step(scheduler)
    assert (begun.prefills, begun.batch, begun.context) == ([], 1, 11)
    assert outputs == [(seq, 101, "")]
    _, outputs = step(scheduler)
    assert outputs == [(seq, 102, "length")]
    assert seq.finish == "length"
    assert scheduler.begin(0.0) is None
    assert scheduler.pool.usage == 0
    assert scheduler.counters.finished["length"] == 1


def test_a_long_prompt_is_read_in_chunks_beside_running_answers() -> None:
    scheduler = make(tokens=8)
    short, long = ask(2, limit=9), ask(range(50, 70), limit=2)
    scheduler.add(short, 0.0)
    step(scheduler)
    scheduler.add(long, 0.0)
    chunks = [step(scheduler)[0].prefills for _ in range(3)]
    assert chunks == [[(0, 7)], [(7, 7)], [(14, 6)]]
    assert long.generated == 1
    assert short.generated == 4


def test_the_budget_bounds_each_step_even_for_running_prompts() -> None:
    scheduler = make(tokens=4)
    for start in (0, 50):
        scheduler.add(ask(range(start, start + 6), limit=1), 0.0)
    work = [[count for _, count in step(scheduler)[0].work] for _ in range(3)]
    assert work == [[4], [2, 2], [4]]
    assert scheduler.unfinished == 0


def test_without_chunking_a_prompt_waits_for_a_step_of_its_own() -> None:
    scheduler = make(tokens=8, chunked=False)
    first, second = ask(2, limit=2), ask(range(50, 58), limit=1)
    scheduler.add(first, 0.0)
    scheduler.add(second, 0.0)
    assert [seq for seq, _ in step(scheduler)[0].work] == [first]
    assert [seq for seq, _ in step(scheduler)[0].work] == [first]
    assert [seq for seq, _ in step(scheduler)[0].work] == [second]


def test_seats_bound_the_batch() -> None:
    scheduler = make(seqs=2)
    for start in (0, 20, 40):
        scheduler.add(ask(range(start, start + 3), limit=2), 0.0)
    assert len(step(scheduler)[0].work) == 2
    assert len(scheduler.waiting) == 1
    finish_all(scheduler)


def test_a_repeated_prompt_hits_all_but_the_block_with_its_last_token() -> None:
    scheduler = make()
    scheduler.add(ask(12, limit=1), 0.0)
    step(scheduler)
    again, longer = ask(12, limit=1), ask(14, limit=1)
    scheduler.add(again, 0.0)
    scheduler.add(longer, 0.0)
    begun, _ = step(scheduler)
    assert (again.cached_tokens, longer.cached_tokens) == (8, 12)
    assert begun.prefills == [(8, 4), (12, 2)]
    counters = scheduler.counters
    assert (counters.prefix_queries, counters.prefix_hits, counters.local_compute) == (38, 20, 18)


def test_said_tokens_fill_blocks_that_the_next_turn_finds() -> None:
    scheduler = make()
    first = ask(6, limit=7)
    scheduler.add(first, 0.0)
    finish_all(scheduler)
    scheduler.add(turn := ask([*first.tokens, 7, 7], limit=1), 0.0)
    step(scheduler)
    assert turn.cached_tokens == 12


def test_another_salt_finds_nothing() -> None:
    scheduler = make()
    scheduler.add(ask(12, limit=1, salt="a"), 0.0)
    step(scheduler)
    scheduler.add(other := ask(12, limit=1, salt="b"), 0.0)
    step(scheduler)
    assert other.cached_tokens == 0


def test_without_prefix_caching_every_prompt_is_read_whole() -> None:
    scheduler = make(caching=False)
    for _ in range(2):
        scheduler.add(seq := ask(12, limit=2), 0.0)
        finish_all(scheduler)
        assert seq.cached_tokens == 0
    assert scheduler.pool.take_events() == []


def test_the_youngest_is_preempted_and_says_the_same_in_the_end() -> None:
    scheduler = make(blocks=6, size=2, caching=False)
    old, young = ask(4, limit=7), ask(range(50, 54), limit=7)
    scheduler.add(old, 0.0)
    scheduler.add(young, 0.0)
    finish_all(scheduler)
    assert scheduler.counters.preemptions > 0
    assert old.tokens[4:] == young.tokens[4:] == list(range(100, 107))
    assert scheduler.pool.free == 6
    assert scheduler.counters.prompt == 8


def test_nobody_is_admitted_in_the_step_of_a_preemption() -> None:
    scheduler = make(blocks=4, size=2, caching=False)
    first, second = ask(4, limit=4), ask(range(50, 53), limit=4)
    scheduler.add(first, 0.0)
    scheduler.add(second, 0.0)
    step(scheduler)
    begun, _ = step(scheduler)
    assert [seq for seq, _ in begun.work] == [first]
    assert list(scheduler.waiting) == [second]


def test_a_sequence_that_preempts_itself_starts_over_at_once() -> None:
    scheduler = make(blocks=3, size=2, caching=False)
    seq = ask(4, limit=2)
    scheduler.add(seq, 0.0)
    step(scheduler)
    other = scheduler.pool.allocate(1)
    assert other is not None
    assert scheduler.begin(0.0) is None
    assert list(scheduler.waiting) == [seq]
    scheduler.pool.release(other)
    finish_all(scheduler)
    assert seq.finish == "length"


def test_the_end_of_answer_token_ends_it_but_not_before_min_tokens() -> None:
    scheduler = make()
    early = ask(3, limit=9, eos=EOS, source=Counting(0))
    late = ask(3, limit=9, eos=EOS, min_tokens=2, source=Counting(0))
    scheduler.add(early, 0.0)
    scheduler.add(late, 0.0)
    finish_all(scheduler)
    assert early.tokens[3:] == [EOS]
    assert late.tokens[3:] == [100, 101, EOS]
    assert early.finish == late.finish == "stop"


def test_ending_from_outside_frees_blocks_wherever_the_sequence_is() -> None:
    scheduler = make(seqs=1)
    running, waiting, remote = ask(8), ask(range(50, 58)), ask(range(70, 78), remote=True)
    scheduler.add(remote, 0.0)
    scheduler.add(running, 0.0)
    scheduler.add(waiting, 0.0)
    begun = scheduler.begin(0.0)
    assert begun is not None
    assert scheduler.take_transfers() == [remote]
    for seq in (running, waiting, remote, running):
        scheduler.finish(seq, "abort", 0.0)
    assert scheduler.commit(begun, 0.0) == []
    assert scheduler.unfinished == 0
    assert scheduler.pool.usage == 0
    assert scheduler.counters.finished["abort"] == 3


def test_prefill_keeps_its_blocks_until_they_are_read() -> None:
    scheduler = make()
    seq = ask(10, limit=1, pin_digest="d")
    scheduler.add(seq, 0.0)
    step(scheduler)
    assert seq.pinned is not None
    assert len(seq.pinned) == 3
    assert scheduler.pool.free == 61
    scheduler.pins.claim(seq.id, "d", 1.0)
    scheduler.unpin(seq.id)
    scheduler.unpin(seq.id)
    assert scheduler.pool.usage == 0


def test_kept_blocks_are_freed_when_the_lease_ends() -> None:
    scheduler = make()
    scheduler.add(ask(10, limit=1, pin_digest="d"), 0.0)
    step(scheduler)
    assert scheduler.begin(29.9) is None
    assert scheduler.pool.free == 61
    assert scheduler.begin(30.0) is None
    assert scheduler.pool.usage == 0


def test_an_aborted_prefill_keeps_nothing() -> None:
    scheduler = make()
    seq = ask(10, pin_digest="d")
    scheduler.add(seq, 0.0)
    scheduler.finish(seq, "abort", 0.0)
    assert len(scheduler.pins) == 0


@pytest.mark.parametrize("length", [10, 12])
def test_decode_takes_the_whole_prompt_from_outside_and_computes_its_last_token_again(length: int) -> None:
    scheduler = make()
    seq = ask(length, limit=2, remote=True)
    scheduler.add(seq, 0.0)
    assert scheduler.begin(0.0) is None
    assert scheduler.take_transfers() == [seq]
    assert scheduler.take_transfers() == []
    assert len(seq.blocks) == 3
    scheduler.received(seq)
    begun, outputs = step(scheduler)
    assert (begun.prefills, begun.batch) == ([], 1)
    assert outputs == [(seq, 100, "")]
    counters = scheduler.counters
    assert (counters.external_hits, counters.local_compute) == (length, 0)
    finish_all(scheduler)
    assert len(scheduler.pool.cached()) == length // 4


def test_decode_fetches_only_what_it_has_not_cached() -> None:
    scheduler = make()
    scheduler.add(ask(8, limit=1), 0.0)
    step(scheduler)
    scheduler.add(seq := ask(12, remote=True), 0.0)
    assert scheduler.begin(0.0) is None
    assert (seq.cached_tokens, seq.remote_tokens) == (8, 4)


def test_a_tiny_prompt_from_outside_has_no_full_block_to_cache() -> None:
    scheduler = make()
    scheduler.add(seq := ask(2, limit=1, remote=True), 0.0)
    assert scheduler.begin(0.0) is None
    scheduler.received(seq)
    assert scheduler.pool.cached() == frozenset()
    step(scheduler)
    assert seq.finish == "length"


def test_kv_that_arrives_after_an_abort_is_ignored() -> None:
    scheduler = make()
    scheduler.add(seq := ask(8, remote=True), 0.0)
    scheduler.begin(0.0)
    scheduler.finish(seq, "abort", 0.0)
    scheduler.received(seq)
    assert scheduler.unfinished == 0
    assert scheduler.pool.usage == 0


def test_received_kv_lost_to_preemption_is_computed_here() -> None:
    scheduler = make(blocks=5, size=2, caching=False)
    first, remote = ask(4, limit=6), ask(range(50, 54), limit=2, remote=True)
    scheduler.add(first, 0.0)
    step(scheduler)
    scheduler.add(remote, 0.0)
    step(scheduler)
    assert scheduler.take_transfers() == [remote]
    scheduler.received(remote)
    finish_all(scheduler)
    assert scheduler.take_transfers() == []
    assert remote.finish == "length"
    assert scheduler.counters.preemptions > 0


def test_requests_wait_for_blocks_in_the_order_they_came() -> None:
    scheduler = make(blocks=4, size=4)
    big, small = ask(12, limit=1), ask(range(50, 60), limit=1)
    tiny = ask([1], limit=1)
    for seq in (big, small, tiny):
        scheduler.add(seq, 0.0)
    assert [seq for seq, _ in step(scheduler)[0].work] == [big]
    assert [seq for seq, _ in step(scheduler)[0].work] == [small, tiny]
