"""The walk along a prompt's blocks, in Python and compiled: how far each place has them without a hole."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.kv.walk import python_walk, walk
from dynctl.native import load

PLACES = 130
HASHES = list(range(1 << 63, (1 << 63) + 150))


def plainly(masks: dict[int, int], hashes: list[int], alive: int) -> list[int]:
    depths = [0] * PLACES
    for place in range(PLACES):
        if alive >> place & 1:
            held = [masks.get(h, 0) >> place & 1 for h in hashes]
            depths[place] = held.index(0) if 0 in held else len(held)
    return depths


@st.composite
def holdings(draw: st.DrawFn, shrinking: bool) -> tuple[dict[int, int], list[int], int]:
    hashes = HASHES[: draw(st.integers(0, len(HASHES)))]
    masks: dict[int, int] = {}
    wide = draw(st.sampled_from([3, 64, PLACES]))
    for place in draw(st.sets(st.integers(0, wide - 1), max_size=12)):
        depth = draw(st.integers(0, len(hashes)))
        holes = set() if shrinking else draw(st.sets(st.integers(0, max(0, depth)), max_size=2))
        for at, h in enumerate(hashes[:depth]):
            if at not in holes:
                masks[h] = masks.get(h, 0) | 1 << place
    for h in masks:  # equal masks of neighbours are mostly one object
        masks[h] = next(mask for mask in masks.values() if mask == masks[h])
    alive = masks.get(hashes[0], 0) if shrinking and hashes else draw(st.integers(0, (1 << wide) - 1))
    return masks, hashes, alive


def check(masks: dict[int, int], hashes: list[int], alive: int, *, shrinking: bool) -> None:
    wanted = plainly(masks, hashes, alive)
    deepest = max((wanted[place] for place in range(PLACES) if alive >> place & 1), default=0)
    found = [0] * PLACES
    assert walk(masks, hashes, alive, found, shrinking=shrinking) == deepest
    assert found == wanted
    with patch.object(load, "compiled", None):
        found = [0] * PLACES
        assert walk(masks, hashes, alive, found, shrinking=shrinking) == deepest
        assert found == wanted


@settings(max_examples=300, deadline=None)
@given(holdings(shrinking=False))
def test_depths_end_at_the_first_hole(given_: tuple[dict[int, int], list[int], int]) -> None:
    check(*given_, shrinking=False)


@settings(max_examples=300, deadline=None)
@given(holdings(shrinking=True))
def test_whole_prefixes_may_be_passed_over_in_strides(given_: tuple[dict[int, int], list[int], int]) -> None:
    check(*given_, shrinking=True)


def test_holders_can_be_asked_for_one_by_one() -> None:
    found = [0, 0]
    assert python_walk(lambda h: 3 if h < 2 else 1, [0, 1, 2, 3], 3, found) == 4
    assert found == [4, 2]


@pytest.mark.compiled
def test_wrong_arguments_are_refused_and_nothing_is_lost() -> None:
    assert load.compiled is not None
    step = load.compiled.walk
    good = ({1: 3}, [1, 2], 3, [0, 0], False, lambda mask: (0, 1))
    assert step(*good) == 1
    for at, wrong in ((0, []), (1, (1, 2)), (2, 1.5), (3, (0, 0))):
        with pytest.raises(TypeError):
            step(*(wrong if i == at else one for i, one in enumerate(good)))  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        step({1: 3}, [1, 2], 3, [0], False, good[5])
    with pytest.raises(ZeroDivisionError):
        step({}, [1], 1 << 70, [0] * 80, False, lambda mask: (1 // 0,))
    with pytest.raises(IndexError):
        step({}, [1], 1 << 70, [0] * 80, False, lambda mask: (-1,))
    with pytest.raises(TypeError):
        step({1: "x"}, [1], 3, [0, 0], False, good[5])  # type: ignore[dict-item]
