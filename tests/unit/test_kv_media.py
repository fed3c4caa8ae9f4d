from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.kv.hashing import extend, extra_bytes, root_hash
from dynctl.kv.media import Layouts, Sightings, Span, extras_of, put_in
from dynctl.kv.translate import Translator
from dynctl.protocol.kv_events import EngineKvBatch, EngineStored, Runs, Shown

SIZE = 4
PAD, ROW, TEXT = 99, 98, 7


def stored(
    tokens: Sequence[int], shown: list[list[tuple[str, int]]], first: int = 1, parent: int | None = None
) -> EngineStored:
    return EngineStored(
        block_hashes=list(range(first, first + len(tokens) // SIZE)),
        parent=parent,
        token_ids=list(tokens),
        block_size=SIZE,
        shown=shown,
    )


def learnt(*events: EngineStored) -> dict[str, Runs]:
    sightings = Sightings()
    for event in events:
        sightings.feed(event)
    return {shown.name: shown.runs for shown in sightings.take()}


def test_an_image_ends_where_its_blocks_go_on_with_other_tokens() -> None:
    event = stored([TEXT] * 2 + [PAD] * 5 + [TEXT], [[("cat", 2)], [("cat", -2)]])
    assert learnt(event) == {"cat": [(PAD, 5)]}


def test_an_image_that_fills_its_last_block_ends_where_the_next_one_shows_nothing() -> None:
    whole = stored([TEXT] * 2 + [PAD] * 6 + [TEXT] * 4, [[("cat", 2)], [("cat", -2)], []])
    assert learnt(whole) == {"cat": [(PAD, 6)]}
    begun = stored([TEXT] * 2 + [PAD] * 6, [[("cat", 2)], [("cat", -2)]])
    assert learnt(begun) == {}
    assert learnt(begun, stored([TEXT] * 4, [], first=3, parent=2)) == {"cat": [(PAD, 6)]}
    assert learnt(begun, stored([TEXT] * 4, [], first=3, parent=77)) == {}
    goes_on = stored([PAD] * 2 + [TEXT] * 2, [[("cat", -6)]], first=3, parent=2)
    assert learnt(begun, goes_on) == {"cat": [(PAD, 8)]}


def test_two_images_in_one_block_end_where_the_next_begins() -> None:
    tokens = [PAD] * 3 + [PAD] * 3 + [TEXT] * 2
    event = stored(tokens, [[("cat", 0), ("dog", 3)], [("dog", -1)]])
    assert learnt(event) == {"cat": [(PAD, 3)], "dog": [(PAD, 3)]}


def test_an_image_of_rows_goes_on_after_a_block_that_looks_like_its_end() -> None:
    tokens = [PAD, PAD, PAD, ROW, PAD, PAD, PAD, TEXT]
    event = stored(tokens, [[("cat", 0)], [("cat", -4)]])
    assert learnt(event) == {"cat": [(PAD, 3), (ROW, 1), (PAD, 3)]}


def test_an_image_whose_beginning_was_missed_is_learnt_when_it_comes_again() -> None:
    sightings = Sightings()
    sightings.feed(stored([PAD] * 3 + [TEXT], [[("cat", -4)]], first=2, parent=1))
    assert sightings.take() == []
    whole = stored([PAD] * 7 + [TEXT], [[("cat", 0)], [("cat", -4)]])
    sightings.feed(whole)
    assert sightings.take() == [Shown("cat", [(PAD, 7)])]
    sightings.feed(whole)
    assert sightings.take() == []


@pytest.mark.parametrize("media", [[("cat", 4)], [("cat", 99)], [("cat", -(10**12))], [("a", 2), ("b", 1)]])
def test_places_that_cannot_be_show_nothing(media: list[tuple[str, int]]) -> None:
    assert not {"cat", "a"} & learnt(stored([PAD] * 8, [media, []])).keys()


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(-9, 9)), max_size=3), max_size=4))
def test_whatever_events_tell_of_images_is_taken(shown: list[list[tuple[str, int]]]) -> None:
    sightings = Sightings()
    for parent in (None, len(shown)):
        sightings.feed(stored([PAD, TEXT, PAD, PAD] * len(shown), shown, parent=parent))
    assert all(count > 0 for told in sightings.take() for _, count in told.runs)


def test_images_half_seen_are_not_kept_without_end() -> None:
    sightings = Sightings()
    for number in range(300):
        sightings.feed(stored([PAD] * 4, [[(str(number), 0)]]))
    assert len(sightings._begun) == 256
    sightings.feed(stored([TEXT] * 4, [], first=2, parent=1))
    assert sightings.take() == [Shown("299", [(PAD, 4)])]


def test_blocks_without_images_cost_nothing() -> None:
    assert learnt(stored([TEXT] * 8, [])) == {}


def test_what_was_learnt_longest_ago_is_forgotten_first() -> None:
    layouts = Layouts(most=2)
    first, second, third = (Shown(name, [(PAD, 1)]) for name in "abc")
    assert layouts.learn(first)
    assert layouts.learn(second)
    assert not layouts.learn(first)
    assert layouts.learn(third)
    assert (layouts.get("a"), layouts.get("b"), len(layouts)) == ([(PAD, 1)], None, 2)
    assert layouts.learn(Shown("a", [(PAD, 2)]))
    assert layouts.all() == [third, Shown("a", [(PAD, 2)])]


def test_images_stand_in_a_prompt_where_their_places_are() -> None:
    tokens, spans = put_in([1, PAD, 2, PAD], [1, 3], [("cat", [(PAD, 3)]), ("dog", [(PAD, 1), (ROW, 2)])])
    assert tokens == [1, PAD, PAD, PAD, 2, PAD, ROW, ROW]
    assert spans == [Span("cat", 1, 4), Span("dog", 5, 8)]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_blocks_put_together_are_hashed_as_the_events_of_an_engine_are(count: int) -> None:
    tokens, spans = put_in([1, 2, PAD, 3, 4, 5, 6, PAD, 8], [2, 7], [("cat", [(PAD, count)])] * 2)
    blocks = len(tokens) // SIZE
    extras = extras_of(spans, blocks, SIZE)
    shown = [
        [(s.name, s.start - i * SIZE) for s in spans if s.start < (i + 1) * SIZE and s.end > i * SIZE]
        for i in range(blocks)
    ]
    told = stored(tokens[: blocks * SIZE], shown)
    keys = [[list(key) for key in row] for row in shown]
    assert extras == [extra_bytes(row) if row else b"" for row in keys]
    translator = Translator(0)
    event = EngineStored(
        block_hashes=told.block_hashes,
        parent=None,
        token_ids=told.token_ids,
        block_size=SIZE,
        extras=extras,
        shown=shown,
    )
    (change,) = translator.feed(EngineKvBatch(timestamp=0, rank=0, events=[event]))
    assert extend(root_hash(), tokens, SIZE, extras) == change.hashes  # type: ignore[union-attr]
    assert translator.images.take() == [Shown("cat", [(PAD, count)])]
