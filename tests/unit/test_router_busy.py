"""When a worker has enough to do: by the operator's thresholds, or by a backlog that is worth waiting for."""

from __future__ import annotations

import pytest

from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.specs import BusySpec
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.busy import BATCH_TOKENS, Busy
from dynctl.router.request import Candidate
from dynctl.router.shared import SharedBlocks
from tests.workers import worker_instance


def load(prefill_tokens: int = 0, blocks: int = 0, *, capacity: int = 100, waiting: int = 0) -> RankLoad:
    made = RankLoad(SharedBlocks())
    made.report(LoadReport("w", 1, 0, running=0, waiting=waiting, kv_usage=0.0, kv_blocks=capacity))
    made.add(Footprint(prefill_tokens, (), blocks))
    return made


def candidates(*loads: RankLoad) -> list[Candidate]:
    instance = worker_instance(id="w")
    return [Candidate(("w", rank), instance, one) for rank, one in enumerate(loads)]


@pytest.mark.parametrize(
    ("thresholds", "calm", "over"),
    [
        (BusySpec(decode_blocks=0.8), load(blocks=80), load(blocks=81)),
        (BusySpec(prefill_tokens=100), load(100), load(101)),
        (BusySpec(prefill_share=0.5), load(BATCH_TOKENS // 2), load(BATCH_TOKENS // 2 + 1)),
        (BusySpec(decode_blocks=0.8, prefill_tokens=5), load(5, 80), load(6, 0)),
    ],
)
def test_one_threshold_passed_is_enough(thresholds: BusySpec, calm: RankLoad, over: RankLoad) -> None:
    busy = Busy(thresholds, 0.0)
    assert (busy.limited, busy.over(calm), busy.over(over)) == (True, False, True)


def test_no_threshold_is_never_passed() -> None:
    busy = Busy(BusySpec(), 0.0)
    assert not busy.limited
    assert not busy.all_busy(candidates(load(10**9, 10**9, waiting=5)))


def test_blocks_of_an_engine_that_does_not_tell_how_many_it_has_are_not_judged() -> None:
    assert not Busy(BusySpec(decode_blocks=0.1), 0.0).over(load(blocks=10**6, capacity=0))


def test_the_engines_own_batch_size_counts_where_it_is_known() -> None:
    small = load(3000)
    small.batch_tokens = 2048
    assert Busy(BusySpec(prefill_share=1.0), 0.0).over(small)


def test_answers_that_are_not_streamed_do_not_make_a_backlog_of_prompts_long_computed() -> None:
    """Their prompts count until the whole answer is there: 100 such would hold all others back."""
    busy = Busy(BusySpec(), 4.0)
    assert busy.backlogged(load(100 * BATCH_TOKENS, waiting=3))
    assert not busy.backlogged(load(100 * BATCH_TOKENS, waiting=0))
    few_wait = load(waiting=2)
    for _ in range(100):
        few_wait.add(Footprint(BATCH_TOKENS))
    assert not busy.backlogged(few_wait), "two of a hundred have not been computed"
    silent = RankLoad(SharedBlocks())
    silent.add(Footprint(100 * BATCH_TOKENS))
    assert not busy.backlogged(silent)


def test_one_calm_rank_is_enough_and_no_rank_is_not_busy() -> None:
    busy = Busy(BusySpec(prefill_tokens=10), 0.0)
    assert busy.all_busy(candidates(load(11), load(12)))
    assert not busy.all_busy(candidates(load(11), load(9)))
    assert not busy.all_busy([])


def test_whoever_waits_hears_of_every_way_a_worker_gets_free() -> None:
    heard: list[str] = []
    made = RankLoad(SharedBlocks())
    made.on_freed = lambda: heard.append("freed")
    ticket = made.add(Footprint(10))
    assert not heard
    ticket.first_token()
    ticket.finish()
    made.report(LoadReport("w", 1, 0, running=0, waiting=0, kv_usage=0.0))
    assert len(heard) == 3
