from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from dynctl.errors import RequestError
from dynctl.kv.hashing import SEED, extend, pack_tokens, root_hash, sequence_hashes

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=70)


def test_hash_is_the_documented_chain() -> None:
    root = root_hash()
    block = b"\x01\x00\x00\x00\x02\x00\x00\x00"
    first = xxh3_64_intdigest(root.to_bytes(8, "little") + block, SEED)
    second = xxh3_64_intdigest(first.to_bytes(8, "little") + block, SEED)
    assert sequence_hashes([1, 2, 1, 2], 2, root) == [first, second]


def test_hashes_never_change_between_releases() -> None:
    assert root_hash() == 6964963774696201994
    assert sequence_hashes(list(range(32)), 16, root_hash()) == [7781042365056485408, 5562184601692181649]


@given(TOKENS, st.integers(1, 9))
def test_only_full_blocks_are_hashed(tokens: list[int], size: int) -> None:
    assert len(sequence_hashes(tokens, size, 0)) == len(tokens) // size


@given(TOKENS, TOKENS, st.integers(1, 9))
def test_extending_equals_hashing_at_once(head: list[int], tail: list[int], size: int) -> None:
    head = head[: len(head) // size * size]
    hashes = sequence_hashes(head, size, root_hash())
    last = hashes[-1] if hashes else root_hash()
    assert hashes + extend(last, tail, size) == sequence_hashes(head + tail, size, root_hash())


@given(TOKENS, st.integers(1, 9))
def test_lists_arrays_and_packed_bytes_hash_alike(tokens: list[int], size: int) -> None:
    wanted = sequence_hashes(tokens, size, 5)
    assert sequence_hashes(array("I", tokens), size, 5) == wanted
    assert sequence_hashes(pack_tokens(tokens), size, 5) == wanted


def test_same_tokens_after_another_prefix_hash_differently() -> None:
    one, other = sequence_hashes([1, 9], 1, 0), sequence_hashes([2, 9], 1, 0)
    assert one[1] != other[1]


def test_adapter_and_salt_are_not_confused() -> None:
    roots = {root_hash(), root_hash("a"), root_hash("", "a"), root_hash("a", "b"), root_hash("ab")}
    assert len(roots) == 5


@pytest.mark.parametrize("token", [-1, 2**32])
def test_impossible_token_id_is_refused(token: int) -> None:
    with pytest.raises(RequestError, match="token id"):
        sequence_hashes([token], 1, 0)
