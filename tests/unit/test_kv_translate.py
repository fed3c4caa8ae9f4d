from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.kv.translate import Memory, Translator
from dynctl.protocol.kv_events import (
    Cleared,
    EngineCleared,
    EngineHash,
    EngineKvBatch,
    EngineKvEvent,
    EngineRemoved,
    EngineStored,
    KvEvent,
    Removed,
    Stored,
    Tier,
)

SIZE = 2
TOKENS = [1, 2, 3, 4, 5, 6]
OWN = sequence_hashes(TOKENS, SIZE, root_hash())


def feed(translator: Translator, *events: EngineKvEvent) -> list[KvEvent]:
    return translator.feed(EngineKvBatch(timestamp=0.0, rank=0, events=list(events)))


def stored(
    names: list[EngineHash], tokens: list[int], parent: EngineHash | None = None, tier: Tier = "G1"
) -> EngineStored:
    return EngineStored(block_hashes=names, parent=parent, token_ids=tokens, block_size=SIZE, tier=tier)


def removed(*names: EngineHash, tier: Tier = "G1", group: int = 0) -> EngineRemoved:
    return EngineRemoved(block_hashes=list(names), tier=tier, group=group)


def test_chain_goes_on_from_the_parent_by_engine_hash() -> None:
    translator = Translator(0)
    assert feed(translator, stored([100, 101], TOKENS[:4])) == [Stored(OWN[:2])]
    assert feed(translator, stored([102], TOKENS[4:], parent=101)) == [Stored(OWN[2:])]
    assert translator.snapshot() == [Stored(OWN)]
    assert translator.block_size == SIZE


def test_signed_and_unsigned_names_are_the_same_block() -> None:
    translator = Translator(0)
    feed(translator, stored([-5], TOKENS[:2]))
    assert feed(translator, stored([7], TOKENS[2:4], parent=2**64 - 5)) == [Stored(OWN[1:2])]
    assert feed(translator, removed(2**64 - 5)) == [Removed(OWN[:1])]


def test_names_of_32_bytes_are_opaque() -> None:
    translator = Translator(0)
    feed(translator, stored([b"a" * 32], TOKENS[:2]))
    assert feed(translator, stored([b"b" * 32], TOKENS[2:4], parent=b"a" * 32)) == [Stored(OWN[1:2])]


def test_unknown_parent_skips_the_chain_and_is_counted() -> None:
    translator = Translator(0)
    assert feed(translator, stored([1], TOKENS[:2])) == [Stored(OWN[:1])]
    assert feed(translator, stored([3, 4], TOKENS[2:6], parent=2)) == []
    assert feed(translator, stored([5], TOKENS[:2], parent=4)) == []
    assert translator.skipped.unknown_parent == 3
    assert feed(translator, removed(3, 4)) == []


def test_repeats_change_nothing_in_g1() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]))
    assert feed(translator, stored([1], TOKENS[:2])) == []
    assert feed(translator, removed(1)) == [Removed(OWN[:1])]
    assert feed(translator, removed(1)) == []


def test_each_copy_in_an_offload_tier_is_removed_by_itself() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]))
    assert feed(translator, stored([1], TOKENS[:2], tier="G2")) == [Stored(OWN[:1], "G2")]
    assert feed(translator, stored([1], TOKENS[:2], tier="G2")) == []
    assert feed(translator, removed(1, tier="G2")) == []
    assert feed(translator, removed(1, tier="G2")) == [Removed(OWN[:1], "G2")]


def test_removal_from_g1_keeps_the_host_copy_and_its_name() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]), stored([1], TOKENS[:2], tier="G2"))
    assert feed(translator, removed(1)) == [Removed(OWN[:1])]
    assert translator.snapshot() == [Stored(OWN[:1], "G2")]
    assert feed(translator, stored([2], TOKENS[2:4], parent=1)) == [Stored(OWN[1:2])]


def test_two_names_of_the_same_tokens_hold_the_block_until_both_are_gone() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]))
    assert feed(translator, stored([2], TOKENS[:2])) == []
    assert feed(translator, removed(1)) == []
    assert feed(translator, removed(2)) == [Removed(OWN[:1])]


def test_images_make_other_blocks_of_the_same_placeholders_and_chains_go_on_after_them() -> None:
    def with_images(names: list[EngineHash], extras: list[bytes]) -> EngineStored:
        return EngineStored(
            block_hashes=names, parent=None, token_ids=[1, 2, 3, 4], block_size=2, extras=extras
        )

    plain, one, other = (Translator(0) for _ in range(3))
    hashes = [
        feed(translator, with_images([11, 12], extras), stored([13], [5, 6], parent=12))
        for translator, extras in ((plain, []), (one, [b"", b"image"]), (other, [b"", b"other"]))
    ]
    told = [event.hashes for events in hashes for event in events if isinstance(event, Stored)]
    assert len(told) == 3
    assert len({found[0] for found in told}) == 1
    assert len({found[1] for found in told}) == len({found[2] for found in told}) == 3
    assert one.skipped.unknown_parent == 0


def test_identities_that_do_not_fit_the_blocks_are_malformed() -> None:
    translator = Translator(0)
    event = EngineStored(block_hashes=[1, 2], parent=None, token_ids=[1, 2], block_size=1, extras=[b"x"])
    assert feed(translator, event) == []
    assert translator.skipped.malformed == 2


def test_removal_for_another_cache_group_is_not_ours() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]))
    assert feed(translator, removed(1, group=1)) == []
    assert translator.snapshot() == [Stored(OWN[:1])]


def test_name_given_to_other_tokens_replaces_what_it_stood_for() -> None:
    translator = Translator(0)
    other = sequence_hashes([9, 9], SIZE, root_hash())
    feed(translator, stored([1], TOKENS[:2]), stored([1], TOKENS[:2], tier="G2"), stored([2], TOKENS[:2]))
    assert feed(translator, stored([1], [9, 9])) == [Removed(OWN[:1], "G2"), Stored(other)]
    assert sorted(translator.snapshot()[0].hashes) == sorted(OWN[:1] + other)


def test_clearing_forgets_every_tier() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]), stored([1], TOKENS[:2], tier="G2"))
    assert feed(translator, EngineCleared()) == [Cleared()]
    assert translator.snapshot() == []
    assert feed(translator, stored([2], TOKENS[2:4], parent=1)) == []


def test_changes_of_one_batch_come_in_its_order_and_joined() -> None:
    translator = Translator(0)
    feed(translator, stored([1, 2], TOKENS[:4]))
    out = feed(
        translator, removed(2), removed(1), stored([1], TOKENS[:2]), stored([2], TOKENS[2:4], parent=1)
    )
    assert out == [Removed([OWN[1], OWN[0]]), Stored(OWN[:2])]


def test_unfinished_last_page_is_skipped_with_what_follows_it() -> None:
    translator = Translator(0)
    short = EngineStored(block_hashes=[2], parent=1, token_ids=[3], block_size=1)
    feed(translator, stored([1], TOKENS[:2]))
    assert feed(translator, short, stored([3], TOKENS[4:], parent=2)) == []
    assert translator.skipped.partial == 2
    assert feed(translator, removed(2)) == []
    assert translator.skipped.unknown_parent == 0


def test_block_size_is_learnt_from_the_largest() -> None:
    translator = Translator(0)
    short = EngineStored(block_hashes=[1], parent=None, token_ids=[1], block_size=1)
    assert feed(translator, short) == [Stored(sequence_hashes([1], 1, root_hash()))]
    assert feed(translator, stored([2], TOKENS[:2])) == [Cleared(), Stored(OWN[:1])]
    assert translator.snapshot() == [Stored(OWN[:1])]


def test_larger_chunks_of_an_offload_tier_are_skipped() -> None:
    translator = Translator(0)
    feed(translator, stored([1], TOKENS[:2]))
    chunk = EngineStored(block_hashes=[1], parent=None, token_ids=TOKENS[:4], block_size=4, tier="G2")
    assert feed(translator, chunk) == []
    assert feed(translator, stored([2], TOKENS[2:4], parent=1)) == [Stored(OWN[1:2])]


@pytest.mark.parametrize(
    "event",
    [
        EngineStored(block_hashes=[1, 2], parent=None, token_ids=[1, 2, 3], block_size=SIZE),
        EngineStored(block_hashes=[1, 2], parent=None, token_ids=[1, 2, 3, -4], block_size=SIZE),
        EngineStored(block_hashes=[1, 2], parent=None, token_ids=[], block_size=0),
    ],
)
def test_tokens_that_do_not_fit_are_skipped_and_counted(event: EngineStored) -> None:
    translator = Translator(0)
    assert feed(translator, event) == []
    assert translator.skipped.malformed == 2


def test_adapter_and_salt_reach_the_whole_chain_by_its_first_block() -> None:
    translator = Translator(0)
    first = EngineStored(
        block_hashes=[1], parent=None, token_ids=TOKENS[:2], block_size=SIZE, lora_name="ad", cache_salt="s"
    )
    feed(translator, first, stored([2], TOKENS[2:4], parent=1))
    assert translator.snapshot() == [Stored(sequence_hashes(TOKENS[:4], SIZE, root_hash("ad", "s")))]


@dataclass(frozen=True)
class Op:
    """Store the block at the end of `path` (its name is the path), or remove it, in one tier."""

    store: bool
    path: tuple[int, ...]
    tier: Tier


OPS = st.lists(
    st.builds(
        Op,
        st.booleans(),
        st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple),
        st.sampled_from(["G1", "G2"]),
    ),
    max_size=40,
)


def name_of(path: tuple[int, ...]) -> EngineHash:
    return bytes(path).ljust(32, b"\xff")


@given(OPS)
def test_translated_events_add_up_to_what_the_engine_holds(ops: list[Op]) -> None:
    translator = Translator(0)
    copies: dict[tuple[Tier, tuple[int, ...]], int] = {}
    seen: dict[Tier, set[int]] = {"G1": set(), "G2": set()}
    for op in ops:
        parent = op.path[:-1]
        here = (op.tier, op.path)
        if op.store:
            tokens = [op.path[-1]] * SIZE
            event: EngineKvEvent = stored(
                [name_of(op.path)], tokens, name_of(parent) if parent else None, op.tier
            )
            if translator.block_size and (not parent or any((t, parent) in copies for t in ("G1", "G2"))):
                copies[here] = 1 if op.tier == "G1" else copies.get(here, 0) + 1
            elif not translator.block_size and op.tier == "G1" and not parent:
                copies[here] = 1
        else:
            event = removed(name_of(op.path), tier=op.tier)
            if here in copies:
                copies[here] -= 1
                if not copies[here]:
                    del copies[here]
        for change in feed(translator, event):
            assert not isinstance(change, Cleared)
            if isinstance(change, Stored):
                assert seen[change.tier].isdisjoint(change.hashes)
                seen[change.tier].update(change.hashes)
            else:
                assert seen[change.tier].issuperset(change.hashes)
                seen[change.tier].difference_update(change.hashes)
        truth = {
            tier: {
                sequence_hashes([t for t in path for _ in range(SIZE)], SIZE, root_hash())[-1]
                for held, path in copies
                if held == tier
            }
            for tier in seen
        }
        assert seen == truth
    assert {(s.tier, h) for s in translator.snapshot() for h in s.hashes} == {
        (tier, h) for tier, hashes in seen.items() for h in hashes
    }


def held(translator: Translator) -> dict[Tier, set[int]]:
    return {one.tier: set(one.hashes) for one in translator.snapshot()}


@given(st.data())
def test_one_that_recalls_goes_on_as_the_one_that_remembered(data: st.DataObject) -> None:
    tiers: st.SearchStrategy[Tier] = st.sampled_from(["G1", "G2"])
    names = st.lists(st.one_of(st.integers(-3, 3), st.sampled_from([b"x", b"y"])), min_size=1, max_size=2)

    def events() -> list[EngineKvEvent]:
        found: list[EngineKvEvent] = []
        for _ in range(data.draw(st.integers(0, 6))):
            some, tier = data.draw(names), data.draw(tiers)
            if data.draw(st.booleans()):
                parent = data.draw(st.one_of(st.none(), st.integers(-3, 3)))
                tokens = data.draw(
                    st.lists(st.integers(1, 3), min_size=2 * len(some), max_size=2 * len(some))
                )
                found.append(stored(list(some), tokens, parent, tier))
            else:
                found.append(removed(*some, tier=tier))
        return found

    first, second = Translator(0), Translator(0)
    feed(first, *events())
    second.recall(msgspec.msgpack.decode(msgspec.msgpack.encode(first.memory()), type=Memory))
    assert held(second) == held(first)
    for event in events():
        assert feed(second, event) == feed(first, event)
    assert held(second) == held(first)
