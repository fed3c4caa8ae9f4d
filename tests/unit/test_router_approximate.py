from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from dynctl.protocol.specs import RouterSpec
from dynctl.router import approximate
from dynctl.router.approximate import Keeping, Recent, guessed, keeping


def test_prompt_counts_for_its_time() -> None:
    recent = Recent(1000)
    place = recent.open(Keeping(10.0))
    assert recent.depths([1, 2], 0.0) is None
    recent.remember(place, [1, 2, 3], 0.0, 1.0)
    assert recent.depths([1, 2, 9], 9.9) == [2]
    assert recent.depths([1, 2, 9], 10.0) is None


def test_prompt_that_took_longer_than_its_time_is_not_kept() -> None:
    recent = Recent(1000)
    place = recent.open(Keeping(10.0))
    recent.remember(place, [1], 0.0, 10.0)
    recent.remember(place, [], 0.0, 0.0)
    assert recent.held == 0


def test_newer_prompt_keeps_what_it_shares_with_an_older_one() -> None:
    recent = Recent(1000)
    place = recent.open(Keeping(10.0))
    recent.remember(place, [1, 2, 3], 0.0, 0.0)
    recent.remember(place, [1, 2, 4], 5.0, 5.0)
    assert recent.depths([1, 2, 3], 11.0) == [2]
    assert recent.held == 3
    assert recent.depths([1, 2, 3], 15.0) is None


def test_places_do_not_mix_and_a_closed_one_is_forgotten() -> None:
    recent = Recent(1000)
    one, other = recent.open(Keeping(10.0)), recent.open(Keeping(10.0))
    recent.remember(one, [1, 2], 0.0, 0.0)
    recent.remember(other, [1], 0.0, 0.0)
    assert recent.depths([1, 2], 0.0) == [2, 1]
    recent.close(one)
    recent.remember(one, [1, 2], 0.0, 0.0)
    assert recent.depths([1, 2], 0.0) == [0, 1]


def test_newer_prompts_push_out_older_ones_of_a_full_place() -> None:
    recent = Recent(1000)
    place = recent.open(Keeping(10.0))
    recent.keep(place, Keeping(inf, 4))
    recent.remember(place, [1, 2, 3], 0.0, 0.0)
    recent.remember(place, [1, 12], 0.0, 0.0)
    recent.remember(place, [21], 0.0, 0.0)
    assert recent.depths([1, 2, 3], 1e9) == [1]
    recent.remember(place, [31, 32, 33, 34, 35], 0.0, 0.0)
    assert recent.held == 0, "a prompt larger than the place leaves nothing"


def test_all_together_are_bounded() -> None:
    recent = Recent(5)
    one, other = recent.open(Keeping(10.0)), recent.open(Keeping(10.0))
    recent.remember(one, [1, 2, 3], 0.0, 0.0)
    recent.remember(other, [1, 2], 0.0, 0.0)
    recent.remember(other, [7], 0.0, 0.0)
    assert recent.depths([1], 0.0) == [0, 1]


def test_same_prompt_again_and_again_takes_no_room_without_end() -> None:
    recent = Recent(5)
    place = recent.open(Keeping(inf, 5))
    for number in range(approximate.MAX_PROMPTS + 10):
        recent.remember(place, [1, 2], float(number), float(number))
    assert len(recent._places[place].prompts) == approximate.MAX_PROMPTS
    assert recent.depths([1, 2], 1e9) == [2]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 4), st.integers(0, 5), st.integers(0, 3)), max_size=40
    ),
    st.integers(1, 30),
)
def test_what_is_held_is_what_is_counted(steps: list[tuple[int, int, int, int]], limit: int) -> None:
    recent, now = Recent(limit), 0.0
    places = [recent.open(Keeping(4.0)), recent.open(Keeping(4.0, 6)), recent.open(Keeping(inf, 6))]
    for place, root, length, wait in steps:
        now += wait
        recent.remember(places[place], [root * 100 + i for i in range(length)], now, now)
        recent.depths([1], now)
        assert recent.held <= limit
        blocks = recent._blocks
        alone = sum(len(tail.hashes) - tail.start for tail in blocks._tails.values())
        assert recent.held == alone + sum(mask.bit_count() for mask in blocks._masks.values())
    for number in places:
        recent.close(number)
    assert (recent.held, len(recent._blocks)) == (0, 0)


def test_how_long_depends_on_what_the_worker_tells() -> None:
    spec = RouterSpec()
    assert keeping(spec, True, 0) == Keeping(spec.predicted_ttl_s)
    assert keeping(spec, False, 0) == Keeping(120.0, 0)
    assert keeping(spec, False, 500) == Keeping(120.0, 500)
    assert keeping(RouterSpec(approximate_cache="lru"), False, 500) == Keeping(inf, 500)
    assert keeping(RouterSpec(approximate_cache="lru"), False, 0) == Keeping(120.0, 0)
    assert keeping(RouterSpec(events="exact"), False, 500) == Keeping(0.0)
    assert [guessed(RouterSpec(events=way), True) for way in ("auto", "exact", "approximate")] == [
        False,
        False,
        True,
    ]
