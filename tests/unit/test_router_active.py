from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from dynctl.protocol.kv_events import LoadReport
from dynctl.router.active import Footprint, InFlight, RankLoad, Ticket
from dynctl.router.shared import SharedBlocks


def report(running: int = 0, waiting: int = 0, usage: float = 0.0) -> LoadReport:
    return LoadReport("w", 1, 0, running, waiting, usage, kv_blocks=100)


def test_ticket_releases_prefill_at_the_first_token_and_the_rest_at_the_end() -> None:
    load = RankLoad(SharedBlocks())
    ticket = load.add(Footprint(100, [1, 2], 3))
    assert (load.prefill_tokens, load.blocks, load.requests, load.own_waiting) == (100, 5, 1, 1)
    ticket.first_token()
    ticket.first_token()
    assert (load.prefill_tokens, load.blocks, load.requests, load.own_waiting) == (0, 5, 1, 0)
    ticket.finish()
    ticket.finish()
    ticket.first_token()
    assert (load.prefill_tokens, load.blocks, load.requests, load.own_waiting) == (0, 0, 0, 0)


def test_request_that_fails_before_its_first_token_leaves_nothing() -> None:
    load = RankLoad(SharedBlocks())
    load.add(Footprint(100, [1], 0)).finish()
    assert (load.prefill_tokens, load.blocks, load.requests, load.own_waiting) == (0, 0, 0, 0)


def test_shared_blocks_count_once() -> None:
    load = RankLoad(SharedBlocks())
    first, second = load.add(Footprint(0, [1, 2, 3])), load.add(Footprint(0, [1, 2, 4]))
    assert load.blocks == 4
    first.finish()
    assert load.blocks == 3
    second.finish()
    assert load.blocks == 0


def test_three_equal_prompts_hold_their_blocks_until_the_last_ends() -> None:
    load = RankLoad(SharedBlocks())
    tickets = [load.add(Footprint(0, [1, 2])) for _ in range(3)]
    for ticket, left in zip(tickets, (2, 2, 0), strict=True):
        ticket.finish()
        assert load.blocks == left


def test_own_requests_in_a_report_are_not_others() -> None:
    load = RankLoad(SharedBlocks())
    load.add(Footprint(10, [1, 2]))
    load.report(report(running=0, waiting=1, usage=0.02))
    assert (load.others_requests, load.others_waiting, load.others_blocks) == (0, 0, 0)


def test_request_that_has_just_ended_is_not_taken_for_others() -> None:
    load = RankLoad(SharedBlocks())
    load.add(Footprint(10, [1, 2])).finish()
    load.report(report(running=1, usage=0.02))
    assert (load.requests, load.blocks) == (0, 0)
    load.report(report(running=1, usage=0.02))
    assert (load.requests, load.blocks) == (0, 0), "the report before may have been on its way"
    load.report(report(running=1, usage=0.02))
    assert (load.requests, load.blocks) == (1, 2)


def test_peers_load_counts_beside_our_own_and_is_not_taken_for_others() -> None:
    load = RankLoad(SharedBlocks())
    load.add(Footprint(10, [1, 2], 1))
    load.set_peers(InFlight(requests=2, waiting=1, prefill_tokens=100, blocks=7))
    assert (load.requests, load.prefill_tokens, load.blocks) == (3, 110, 10)
    assert load.own == InFlight(requests=1, waiting=1, prefill_tokens=10, blocks=3)
    load.report(report(running=1, waiting=2, usage=0.1))
    assert (load.requests, load.others_requests, load.others_waiting, load.others_blocks) == (3, 0, 0, 0)
    load.set_peers(InFlight())
    assert (load.requests, load.prefill_tokens, load.blocks) == (1, 10, 3)
    load.report(report(running=3, usage=0.1))
    assert load.others_requests == 0, "what has just ended there may still be in the report"


def test_peers_request_reported_by_the_engine_before_the_peer_counts_once() -> None:
    load = RankLoad(SharedBlocks())
    load.report(report(running=1, waiting=1, usage=0.1))
    assert (load.requests, load.others_waiting, load.blocks) == (2, 1, 10)
    load.set_peers(InFlight(requests=2, waiting=1, prefill_tokens=9, blocks=10))
    assert (load.requests, load.others_waiting, load.blocks) == (2, 0, 10)


def test_each_change_of_our_own_part_is_told() -> None:
    load = RankLoad(SharedBlocks())
    told: list[InFlight] = []
    load.on_change = lambda: told.append(load.own)
    ticket = load.add(Footprint(10, [1], 1))
    ticket.first_token()
    ticket.finish()
    ticket.finish()
    load.set_peers(InFlight(requests=1))
    load.report(report(running=5))
    assert told == [InFlight(1, 1, 10, 2), InFlight(1, 0, 0, 2), InFlight()]


def test_load_of_others_counts_until_a_report_without_it() -> None:
    load = RankLoad(SharedBlocks())
    load.report(report(running=3, waiting=2, usage=0.5))
    assert (load.requests, load.others_waiting, load.blocks) == (5, 2, 50)
    load.report(report())
    assert (load.requests, load.others_waiting, load.blocks) == (0, 0, 0)


def test_place_of_a_worker_that_left_is_reused_only_after_its_last_request() -> None:
    shared = SharedBlocks()
    old = RankLoad(shared)
    ticket = old.add(Footprint(0, [1, 2]))
    old.retire()
    new = RankLoad(shared)
    assert new.place != old.place
    assert shared.depths([1, 2])[new.place] == 0
    ticket.finish()
    assert RankLoad(shared).place == old.place
    assert shared.depths([1, 2]) == [0, 0]


def test_idle_worker_that_left_gives_its_place_back_at_once() -> None:
    shared = SharedBlocks()
    old = RankLoad(shared)
    old.retire()
    assert RankLoad(shared).place == old.place


def test_hashes_that_are_no_prefix_never_leave_an_idle_worker_loaded() -> None:
    shared = SharedBlocks()
    load, other = RankLoad(shared), RankLoad(shared)
    tickets = [load.add(Footprint(0, hashes)) for hashes in ([1, 2], [5, 6, 1])]
    tickets.append(other.add(Footprint(0, [7, 8, 2])))
    for ticket in reversed(tickets):
        ticket.finish()
    assert load.blocks == other.blocks == 0


PATHS = st.lists(st.integers(0, 2), max_size=4).map(tuple)
"""A prompt as a path in a tree; its hashes are its prefixes."""


def prefixes(path: tuple[int, ...]) -> list[int]:
    return [hash((7, *path[: depth + 1])) for depth in range(len(path))]


def held_depth(live: Sequence[tuple[int, list[int]]], place: int, hashes: list[int]) -> int:
    counts = Counter(h for where, held in live if where == place for h in held)
    return next((depth for depth, h in enumerate(hashes) if not counts[h]), len(hashes))


LONG_PATHS = st.lists(st.integers(0, 1).map(lambda step: (step,) * 19), max_size=5).map(
    lambda runs: tuple(step for run in runs for step in run)[:-2]
)
"""Longer than a stride, parting where none ends."""


@given(
    st.lists(st.tuples(st.integers(0, 2), PATHS | LONG_PATHS, st.booleans()), max_size=25), PATHS | LONG_PATHS
)
def test_shared_blocks_equal_a_count_per_block(
    steps: list[tuple[int, tuple[int, ...], bool]], probe: tuple[int, ...]
) -> None:
    shared = SharedBlocks()
    loads = [RankLoad(shared) for _ in range(3)]
    live: list[tuple[int, list[int], Ticket]] = []
    for place, path, begins in steps:
        if begins or not live:
            hashes = prefixes(path)
            live.append((place, hashes, loads[place].add(Footprint(0, hashes))))
        else:
            live.pop(len(path) % len(live))[2].finish()
        held = [(where, hashes) for where, hashes, _ in live]
        assert len(shared) == len({h for _, hashes in held for h in hashes})
        for number, load in enumerate(loads):
            assert load.blocks == len({h for where, hashes in held if where == number for h in hashes})
            assert shared.depths(prefixes(probe))[number] == held_depth(held, number, prefixes(probe))
    for _, _, ticket in live:
        ticket.finish()
    assert not shared._masks
    assert not shared._tails
    assert not any(shared._needs)


@given(st.lists(st.integers(0, 40), min_size=3, max_size=3), st.integers(0, 40))
def test_depths_of_long_prompts(held: list[int], length: int) -> None:
    shared = SharedBlocks()
    prompt = [1000 + i for i in range(40)]
    for place, depth in enumerate(held):
        assert shared.open() == place
        assert shared.add(place, prompt[:depth]) == depth
    assert shared.depths(prompt[:length]) == [min(depth, length) for depth in held]


def test_one_worker_ends_a_prompt_whose_beginning_runs_elsewhere_too() -> None:
    shared = SharedBlocks()
    here, there = shared.open(), shared.open()
    shared.add(here, [1, 2, 3])
    shared.add(there, [1, 2])
    assert shared.remove(here, [1, 2, 3]) == 3
    assert shared.depths([1, 2, 3]) == [0, 2]
    shared.add(here, [1])
    assert shared.remove(there, [1, 2]) == 2
    assert shared.depths([1, 2, 3]) == [1, 0]
    assert len(shared) == 1


def test_removing_more_than_was_added_takes_what_is_there() -> None:
    shared = SharedBlocks()
    here = shared.open()
    shared.add(here, [1, 2])
    assert shared.remove(here, [1, 2, 3]) == 2
    assert len(shared) == 0
