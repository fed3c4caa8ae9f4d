"""Who holds which blocks, in Python and compiled: both the same after any history."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.kv.holders import PythonHolders, holders
from dynctl.native import load

TOP = (1 << 64) - 1
HASHES = [*range(12), *range(1 << 63, (1 << 63) + 12), TOP - 1, TOP]


@pytest.fixture(params=["compiled", "in Python"])
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    with patch.object(load, "compiled", load.compiled if request.param == "compiled" else None):
        yield


ROWS = st.lists(st.sampled_from(HASHES), max_size=12)
PLACES = st.sampled_from([0, 1, 2, 63, 64, 130])
STEPS = st.one_of(
    st.tuples(st.sampled_from(["add", "add", "discard"]), PLACES, ROWS),
    st.tuples(st.just("clear"), PLACES),
    st.tuples(st.just("touch"), ROWS),
    st.tuples(st.just("evict"), st.integers(0, 5)),
)


def mask_of(places: set[int]) -> bytes:
    return sum(1 << place for place in places).to_bytes(20, "little")


@pytest.mark.compiled
@settings(max_examples=400, deadline=None)
@given(
    st.lists(STEPS, max_size=40),
    st.lists(ROWS, min_size=1, max_size=3),
    st.sets(PLACES),
    st.integers(0, 2**64 - 1),
)
def test_both_are_the_same_after_any_history(
    steps: list[tuple[str, ...]], prompts: list[list[int]], alive: set[int], seed: int
) -> None:
    assert load.compiled is not None
    one, other = load.compiled.Holders(seed), PythonHolders()
    for name, *given_ in steps:
        for there in (one, other):
            if name == "clear":
                place = given_[0]
                while there.count(place):  # type: ignore[arg-type]
                    there.clear(place, 3)  # type: ignore[arg-type]
            else:
                getattr(there, name)(*given_)
        assert len(one) == len(other)
        assert [one.get(h) for h in HASHES] == [other.get(h) for h in HASHES]
        assert [one.count(place) for place in range(140)] == [other.count(place) for place in range(140)]
        for prompt in prompts:
            for size in (1, 65, 131):
                mask = mask_of(alive)
                assert one.walk(prompt, mask, size) == other.walk(prompt, mask, size)


@pytest.mark.compiled
def test_both_are_the_same_with_many_blocks_that_come_and_go() -> None:
    assert load.compiled is not None
    rng, one, other = Random(7), load.compiled.Holders(11), PythonHolders()
    known: list[list[int]] = []
    for turn in range(3000):
        place = rng.randrange(70)
        row = rng.choice(known) if known and rng.random() < 0.6 else [rng.getrandbits(64) for _ in range(8)]
        known = [*known[-200:], row]
        act = "add" if rng.random() < 0.55 else "discard"
        for there in (one, other):
            getattr(there, act)(place, row)
            if turn % 7 == 0:
                there.touch(row)
            if len(there) > 900:
                there.evict(100)
        if turn % 100 == 99:
            while other.count(place):
                other.clear(place, 5)
            while one.count(place):
                one.clear(place, 5)
        assert len(one) == len(other)
    everything = [h for row in known for h in row]
    assert [one.get(h) for h in everything] == [other.get(h) for h in everything]
    assert one.evict(10**6) == other.evict(10**6)
    assert len(one) == len(other) == sum(one.count(place) for place in range(70)) == 0


@pytest.mark.compiled
def test_hashes_and_sets_that_differ_in_their_highest_bits_only_are_told_apart_soon() -> None:
    assert load.compiled is not None
    there = load.compiled.Holders(Random(3).getrandbits(64))
    hashes = [number << 48 for number in range(1 << 16)]
    for place in range(48, 64):
        there.add(place, [h for h in hashes if h >> place & 1])
    assert [there.get(h) for h in hashes] == hashes, "looked for one by one, this takes minutes"
    for place in range(48, 64):
        there.discard(place, hashes)
    assert len(there) == 0


def test_text_is_held_by_nobody(path: None) -> None:
    there = holders()
    there.add(0, [0, 1, TOP])
    assert [there.get(h) for h in (TOP + 1, TOP + 2, -1)] == [0, 0, 0]


def test_place_cleared_in_part_and_filled_again_is_cleared_whole(path: None) -> None:
    there = holders()
    there.add(1, list(range(100)))
    there.add(0, list(range(100)))
    there.clear(0, 10)
    there.discard(0, list(range(100)))
    there.add(0, [0])
    assert there.clear(0, 100) > 0
    assert (there.count(0), there.get(0)) == (0, 2)


def test_oldest_go_first_and_touched_are_young(path: None) -> None:
    there = holders()
    there.add(0, [1, 2, 3, 4])
    there.add(1, [1])
    there.touch([1, 99])
    assert there.evict(2) == 2
    assert [there.get(h) for h in (1, 2, 3, 4)] == [3, 0, 0, 1]
    assert (there.count(0), there.count(1), len(there)) == (2, 1, 2)


def test_a_place_is_cleared_in_portions(path: None) -> None:
    there = holders()
    there.add(0, list(range(100)))
    there.add(1, list(range(50, 200)))
    portions = 0
    while there.count(0):
        there.clear(0, 7)
        portions += 1
    assert portions >= 10, "a portion is not all"
    assert (len(there), there.count(1)) == (150, 150)
    there.add(0, [3])
    there.add(0, list(range(190, 200)))
    while there.count(0):
        there.clear(0, 7)
    assert (len(there), there.count(1)) == (150, 150), "what came after the last time is cleared, too"


def test_text_that_is_no_block_ends_a_walk(path: None) -> None:
    there = holders()
    there.add(0, [1, 2, 3, TOP])
    assert there.walk([1, 2, TOP + 1, 3], b"\x01", 1) == there.walk([1, 2, TOP + 4], b"\x01", 1) == [2]
    assert there.walk([TOP + 2, 1], b"\x01", 1) == [0]
    there.touch([1, TOP + 1])
    assert there.evict(1) == 1
    assert (there.get(1), there.get(2)) == (1, 0)


@pytest.mark.compiled
def test_wrong_arguments_are_refused_and_nothing_is_lost() -> None:
    assert load.compiled is not None
    there: Any = load.compiled.Holders(1)
    there.add(0, [1])
    for wrong in (["x"], [1.5]):
        for call in (partial(there.add, 0), partial(there.discard, 0), there.touch):
            with pytest.raises(TypeError):
                call([2, *wrong])
        with pytest.raises(TypeError):
            there.walk([1, *wrong], b"\x01", 1)
    with pytest.raises(OverflowError):
        there.add(0, [2, TOP + 1])
    for place in (-1, 1 << 20):
        with pytest.raises(IndexError):
            there.add(place, [1])
    for call in (there.add, there.discard):
        with pytest.raises(TypeError):
            call(0, (1,))
    with pytest.raises(TypeError):
        there.touch((1,))
    with pytest.raises(TypeError):
        there.__init__(2)
    kind: Any = type(there)
    unmade = kind.__new__(kind)
    assert (len(unmade), unmade.get(1), unmade.evict(3), unmade.walk([1], b"\x01", 2)) == (0, 0, 0, [0, 0])
    with pytest.raises(IndexError):
        unmade.add(0, [1])
    assert (there.get(1), there.count(0)) == (1, 1)
