from __future__ import annotations

from collections.abc import Iterator, Sequence
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.kv.hashing import OF_BYTES
from dynctl.kv.index import Index, SlotKey
from dynctl.native import load
from dynctl.protocol.kv_events import Cleared, KvEvent, Removed, Stored, Tier


@pytest.fixture(autouse=True, params=["compiled", "in Python"], scope="module")
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    with patch.object(load, "compiled", load.compiled if request.param == "compiled" else None):
        yield


A: SlotKey = ("a", 0)
B: SlotKey = ("b", 0)
B1: SlotKey = ("b", 1)


def test_depth_ends_at_the_first_hole() -> None:
    index = Index()
    index.apply(A, Stored([1, 2, 4]))
    index.apply(B, Stored([1, 2, 3, 4]))
    index.apply(B1, Stored([2, 3]))
    assert index.match([1, 2, 3, 4, 5]) == {A: 2, B: 4}


def test_no_hashes_and_no_workers_match_nothing() -> None:
    index = Index()
    assert index.match([1]) == {}
    index.apply(A, Stored([1]))
    assert index.match([]) == {}


def test_match_among_some_keys_only() -> None:
    index = Index()
    for key in (A, B):
        index.apply(key, Stored([1]))
    assert index.match([1], [B, ("unknown", 0)]) == {B: 1}
    assert index.match([1], []) == {}


def test_removal_in_one_tier_leaves_the_other() -> None:
    index = Index()
    index.apply(A, Stored([1], "G1"))
    index.apply(A, Stored([1], "G2"))
    index.apply(A, Removed([1], "G1"))
    assert index.match([1]) == {}
    assert index.match([1], tiers=("G2",)) == {A: 1}
    assert (index.stats("G1"), index.stats("G2")) == ({A: 0}, {A: 1})


def test_text_is_followed_in_an_index_of_several_tiers() -> None:
    index = Index()
    index.apply(A, Stored([1], "G1"))
    index.apply(A, Stored([2], "G2"))
    assert index.match([1, 2, OF_BYTES | 3], tiers=("G1", "G2")) == {A: 2}
    assert index.depths([OF_BYTES | 1], ("G1", "G2")) == [0, 0]


def test_removal_of_blocks_held_only_in_part() -> None:
    index = Index()
    index.apply(A, Stored([1, 2]))
    index.apply(A, Removed([2, 3]))
    assert index.match([1, 2]) == {A: 1}


@pytest.mark.parametrize("event", [Removed([1]), Removed([9], "G3"), Cleared()])
def test_forgetting_what_was_never_held_changes_nothing(event: KvEvent) -> None:
    index = Index()
    index.apply(A, event)
    assert index.stats() == {}
    assert not index.sweep(1)


def test_removed_worker_goes_with_all_ranks() -> None:
    index = Index()
    for key in (A, B, B1):
        index.apply(key, Stored([1]))
    index.remove_worker("b")
    assert index.match([1]) == {A: 1}


def test_slot_is_given_out_again_only_when_clean() -> None:
    index = Index()
    index.apply(A, Stored([1, 2, 3]))
    index.reset(A)
    assert index.dirty
    index.apply(B, Stored([9]))
    assert index.match([1]) == {}
    assert index.sweep(2)
    index.apply(B1, Stored([8]))
    assert index.match([1]) == {}
    assert not index.sweep(2)
    index.apply(A, Stored([7]))
    assert index.match([1]) == index.match([2]) == {}
    assert index.match([7]) == {A: 1}
    assert not index.dirty


HASHES = st.lists(st.integers(1, 8), max_size=6)
KEYS = st.sampled_from([A, B, B1])
TIERS = st.sampled_from(["G1", "G2"])
EVENTS = st.one_of(st.builds(Stored, HASHES, TIERS), st.builds(Removed, HASHES, TIERS), st.builds(Cleared))
STEPS = st.one_of(
    st.tuples(KEYS, EVENTS),
    st.integers(0, 4),
    st.sampled_from(["a", "b"]),
)


class Naive:
    """One set of hashes per key and tier."""

    def __init__(self) -> None:
        self.held: dict[SlotKey, dict[Tier, set[int]]] = {}

    def apply(self, key: SlotKey, event: KvEvent) -> None:
        tiers = self.held.setdefault(key, {"G1": set(), "G2": set()})
        if isinstance(event, Stored):
            tiers[event.tier].update(event.hashes)
        elif isinstance(event, Removed):
            tiers[event.tier].difference_update(event.hashes)
        else:
            self.held.pop(key)

    def remove_worker(self, worker: str) -> None:
        self.held = {key: tiers for key, tiers in self.held.items() if key[0] != worker}

    def match(self, hashes: Sequence[int], tier: Tier) -> dict[SlotKey, int]:
        found = {}
        for key, tiers in self.held.items():
            depth = 0
            while depth < len(hashes) and hashes[depth] in tiers[tier]:
                depth += 1
            if depth:
                found[key] = depth
        return found


@given(
    st.lists(STEPS, max_size=25),
    st.lists(st.lists(st.integers(1, 8), max_size=8, unique=True), min_size=1, max_size=4),
)
def test_index_equals_sets_per_worker(
    steps: list[tuple[SlotKey, KvEvent] | int | str], prompts: list[list[int]]
) -> None:
    index, naive = Index(), Naive()
    for step in steps:
        if isinstance(step, int):
            index.sweep(step)
        elif isinstance(step, str):
            index.remove_worker(step)
            naive.remove_worker(step)
        else:
            index.apply(*step)
            naive.apply(*step)
        for tier in ("G1", "G2"):
            for prompt in prompts:
                assert index.match(prompt, tiers=(tier,)) == naive.match(prompt, tier)
            counts = {key: len(tiers[tier]) for key, tiers in naive.held.items() if tiers[tier]}
            assert {key: count for key, count in index.stats(tier).items() if count} == counts
    assert not index.sweep(10**6)
    everything = {h for tiers in naive.held.values() for h in tiers["G1"]}
    assert len(index._tiers["G1"]) == len(everything), "hashes that nobody holds take no memory"


def test_oldest_blocks_are_forgotten_beyond_the_limit() -> None:
    index = Index(limit=8)
    index.apply(A, Stored([1, 2, 3, 4, 5, 6, 7, 8]))
    index.apply(B, Stored([1]))
    index.apply(A, Stored([9]))
    assert index.match([1]) == {}
    assert index.match([2, 3]) == {A: 2}
    assert (len(index), index.evicted) == (8, 1)
    index.apply(A, Removed([1]))
    assert index.stats() == {A: 8, B: 0}


def test_limit_counts_all_tiers_and_the_largest_gives() -> None:
    index = Index(limit=8)
    index.apply(A, Stored([1, 2], "G1"))
    index.apply(A, Stored([11, 12, 13, 14, 15, 16], "G2"))
    index.apply(A, Stored([3], "G1"))
    assert index.match([1, 2, 3]) == {A: 3}
    assert index.match([11], tiers=("G2",)) == {}
    assert len(index) == 8


def test_touched_blocks_stay_when_the_index_is_nearly_full_only() -> None:
    index = Index(limit=8)
    index.apply(A, Stored([1, 2, 3]))
    index.touch([1], 1)
    index.apply(A, Stored([4, 5, 6, 7, 8, 9]))
    assert (index.match([1]), index.match([2])) == ({}, {A: 1}), "it was not touched: there was room"
    index.apply(A, Removed([9]))
    index.apply(A, Stored([1]))
    index.touch([2, 99, 3], 2)
    index.apply(A, Stored([9]))
    assert index.match([2]) == {A: 1}
    assert index.match([3]) == {}


def test_blocks_of_a_forgotten_worker_make_room_too() -> None:
    index = Index(limit=8)
    index.apply(A, Stored(list(range(8))))
    index.reset(A)
    index.apply(B, Stored([100, 101]))
    assert not index.sweep(100)
    assert (len(index), index.match([100, 101])) == (2, {B: 2})


@given(
    st.lists(STEPS, max_size=25),
    st.lists(st.lists(st.integers(1, 8), max_size=8, unique=True), min_size=1, max_size=4),
    st.integers(1, 10),
)
def test_bounded_index_never_holds_more_nor_what_is_not_there(
    steps: list[tuple[SlotKey, KvEvent] | int | str], prompts: list[list[int]], limit: int
) -> None:
    index, naive = Index(limit), Naive()
    for step in steps:
        if isinstance(step, int):
            index.sweep(step)
        elif isinstance(step, str):
            index.remove_worker(step)
            naive.remove_worker(step)
        else:
            index.apply(*step)
            naive.apply(*step)
        assert len(index) <= limit
        for prompt in prompts:
            true = naive.match(prompt, "G1")
            assert all(depth <= true.get(key, 0) for key, depth in index.match(prompt).items())
    assert not index.sweep(10**6)
    held = sum(count for tier in ("G1", "G2") for count in index.stats(tier).values())
    assert held == sum(there.get(h).bit_count() for there in index._tiers.values() for h in range(1, 9))
