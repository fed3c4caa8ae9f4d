"""The KV event dialect: both encodings, both engines, and what must not reach the index."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dynctl.engines import kv_dialect
from dynctl.errors import CodecError
from dynctl.protocol.kv_events import EngineCleared, EngineRemoved, EngineStored


def batch(*events: Any, rank: Any = 0) -> bytes:
    return msgspec.msgpack.encode([12.5, list(events), rank])


def stored(**changes: Any) -> dict[str, Any]:
    """A store of two blocks of two tokens, as vLLM sends it, with changes."""
    event = {
        "type": "BlockStored",
        "block_hashes": [11, 12],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
    }
    return {**event, **changes}


def only(payload: bytes) -> EngineStored:
    (event,) = kv_dialect.decode(payload).events
    assert isinstance(event, EngineStored)
    return event


def test_map_and_array_forms_mean_the_same() -> None:
    as_map = batch(stored(parent_block_hash=9, lora_name="ad1", extra_keys=[["ad1"], ["ad1"]], group_idx=0))
    as_array = batch(["BlockStored", [11, 12], 9, [1, 2, 3, 4], 2, 3, "GPU", "ad1", [["ad1"], ["ad1"]], 0])
    expected = EngineStored(
        block_hashes=[11, 12], parent=9, token_ids=[1, 2, 3, 4], block_size=2, lora_name="ad1"
    )
    assert only(as_map) == only(as_array) == expected


def test_removed_and_cleared_in_both_forms() -> None:
    payload = batch(
        {"type": "BlockRemoved", "block_hashes": [1], "medium": "CPU", "group_idx": 2},
        ["BlockRemoved", [1], "CPU", 2],
        {"type": "AllBlocksCleared"},
        ["AllBlocksCleared"],
    )
    removed = EngineRemoved(block_hashes=[1], tier="G2", group=2)
    assert kv_dialect.decode(payload).events == [removed, removed, EngineCleared(), EngineCleared()]


def test_array_form_without_the_later_fields() -> None:
    assert only(batch(["BlockStored", [5], None, [1, 2], 2])).tier == "G1"


@pytest.mark.parametrize(("rank", "expected"), [(3, 3), (None, 0)])
def test_rank_of_the_batch(rank: int | None, expected: int) -> None:
    decoded = kv_dialect.decode(batch(stored(), rank=rank))
    assert (decoded.rank, decoded.timestamp) == (expected, 12.5)


def test_batch_without_a_rank_is_rank_0() -> None:
    assert kv_dialect.decode(msgspec.msgpack.encode([1, []])).rank == 0


def test_signed_hashes_become_unsigned() -> None:
    event = only(batch(stored(block_hashes=[-1, -(2**63)], parent_block_hash=-2)))
    assert event.block_hashes == [2**64 - 1, 2**63]
    assert event.parent == 2**64 - 2


def test_long_hashes_stay_bytes() -> None:
    event = only(batch(stored(block_hashes=[b"a" * 32, b"b" * 32], parent_block_hash=b"c" * 32)))
    assert event.block_hashes == [b"a" * 32, b"b" * 32]
    assert event.parent == b"c" * 32


@pytest.mark.parametrize(
    ("medium", "tier"),
    [
        ("GPU", "G1"),
        (None, "G1"),
        ("CPU", "G2"),
        ("CPU_PINNED", "G2"),
        ("DISK", "G3"),
        ("STORAGE", "G3"),
        ("EXTERNAL", "G4"),
    ],
)
def test_media_are_tiers(medium: str | None, tier: str) -> None:
    decoded = kv_dialect.decode(
        batch(stored(medium=medium), {"type": "BlockRemoved", "block_hashes": [1], "medium": medium})
    )
    assert [event.tier for event in decoded.events if not isinstance(event, EngineCleared)] == [tier, tier]


def test_unknown_medium_is_skipped() -> None:
    payload = batch(
        stored(medium="TAPE"), {"type": "BlockRemoved", "block_hashes": [1], "medium": "TAPE"}, stored()
    )
    assert len(kv_dialect.decode(payload).events) == 1


def test_unknown_types_and_keys_are_skipped() -> None:
    decoded = kv_dialect.decode(batch({"type": "News"}, ["News", 1], stored(session_id="s", brand_new=1)))
    assert len(decoded.events) == 1


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("full_attention", True),
        ("mla_attention", True),
        (None, True),
        ("sliding_window", False),
        ("mamba", False),
    ],
)
def test_groups_that_hold_no_whole_prefix_are_skipped(kind: str | None, kept: bool) -> None:
    decoded = kv_dialect.decode(batch(stored(kv_cache_spec_kind=kind, group_idx=1)))
    assert [event.group for event in decoded.events if isinstance(event, EngineStored)] == (
        [1] if kept else []
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": [1, 2, 3]},
        {"token_ids": [1, 2, 3, 4, 5, 6]},
        {"block_size": 0},
        {"block_hashes": []},
    ],
)
def test_tokens_that_do_not_fit_the_blocks_are_skipped(changes: dict[str, Any]) -> None:
    assert kv_dialect.decode(batch(stored(**changes))).events == []


def test_eagle_pairs_give_their_first_token() -> None:
    assert only(batch(stored(token_ids=[[1, 2], [2, 3], [3, 4], [4, 5]]))).token_ids == [1, 2, 3, 4]


def test_salt_of_the_first_block_of_a_prompt() -> None:
    assert only(batch(stored(extra_keys=[["s1"], None]))).cache_salt == "s1"


def test_salt_beside_an_adapter() -> None:
    event = only(batch(stored(lora_name="ad1", extra_keys=[["ad1", "s1"], ["ad1"]])))
    assert (event.lora_name, event.cache_salt) == ("ad1", "s1")


def test_salt_as_sglang_names_it() -> None:
    assert only(batch(stored(cache_salt="s2"))).cache_salt == "s2"


def test_a_block_with_media_keeps_its_place_in_the_chain_and_their_identity() -> None:
    event = only(batch(stored(extra_keys=[None, [["image-hash", 0]]])))
    other = only(batch(stored(extra_keys=[None, [["image-hash", -2]]])))
    assert (event.block_hashes, event.token_ids) == ([11, 12], [1, 2, 3, 4])
    assert event.extras[0] == b"" != event.extras[1] != other.extras[1]
    assert only(batch(stored(extra_keys=[None, None]))).extras == []


@pytest.mark.parametrize(
    ("keys", "salt"),
    [
        ([["image", 0]], ""),
        (["salt", "embeds-digest"], "salt"),
        ([["image", 0], "s"], "s"),
        ([b"digest"], ""),
    ],
)
def test_what_a_prompt_starts_with_beside_tokens_is_told_from_its_salt(keys: list[Any], salt: str) -> None:
    event = only(batch(stored(extra_keys=[keys, None])))
    assert event.cache_salt == salt
    assert [bool(extra) for extra in event.extras] == [True, False]


def test_further_key_in_a_later_event_is_no_salt() -> None:
    event = only(batch(stored(parent_block_hash=9, extra_keys=[["x"], None])))
    assert event.cache_salt == ""
    assert event.extras[0]


def test_identities_of_fewer_blocks_than_stored_are_filled_up() -> None:
    assert len(only(batch(stored(extra_keys=[[["image", 0]]]))).extras) == 2


def test_adapter_known_by_its_local_number_alone_matches_no_request() -> None:
    assert only(batch(["BlockStored", [11], None, [1, 2], 2, 7, "GPU"])).lora_name == "\0lora-7"


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        b"",
        msgspec.msgpack.encode({"a": 1}),
        msgspec.msgpack.encode([1.0]),
        msgspec.msgpack.encode([1.0, 2]),
        msgspec.msgpack.encode(["now", []]),
        msgspec.msgpack.encode([1.0, [], "rank"]),
    ],
)
def test_bytes_that_are_no_batch(payload: bytes) -> None:
    with pytest.raises(CodecError):
        kv_dialect.decode(payload)


@pytest.mark.parametrize(
    "event",
    [
        7,
        [],
        {"no": "type"},
        stored(block_hashes=["text"]),
        stored(block_hashes=None),
        {"type": "BlockStored"},
        stored(token_ids=[[]]),
    ],
)
def test_malformed_event(event: Any) -> None:
    with pytest.raises(CodecError, match="malformed"):
        kv_dialect.decode(batch(event))


@pytest.mark.parametrize(
    ("fields", "tier"),
    [
        ({}, "G1"),
        ({"medium": "CPU"}, "G2"),
        ({"medium": "CPU_PINNED"}, "G2"),
        ({"medium": "DISK"}, "G3"),
        ({"medium": "STORAGE", "locality": "LOCAL"}, "G3"),
        ({"medium": "STORAGE", "locality": "REMOTE"}, "G4"),
        ({"medium": "EXTERNAL"}, "G4"),
    ],
)
def test_media_of_every_engine_are_told_apart_in_stores_and_removals(fields: Any, tier: str) -> None:
    assert only(batch(stored(**fields))).tier == tier
    gone = kv_dialect.decode(batch({"type": "BlockRemoved", "block_hashes": [11], **fields})).events
    assert [event.tier for event in gone if isinstance(event, EngineRemoved)] == [tier]


def test_media_that_blocks_show_are_told_with_their_places() -> None:
    shows = only(batch(stored(extra_keys=[[["cat", 1]], [["cat", -1], ["dog", 1], b"digest"]]))).shown
    assert shows == [[("cat", 1)], [("cat", -1), ("dog", 1)]]
    assert only(batch(stored(extra_keys=[[["cat", 0]]]))).shown == [[("cat", 0)], []]
    assert only(batch(stored(extra_keys=[[b"digest"], [["odd"]]]))).shown == []
    assert only(batch(stored(extra_keys=[["salt"], None]))).shown == []
