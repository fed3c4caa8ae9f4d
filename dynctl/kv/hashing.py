"""dynctl's own block hashes: one per full block of tokens, each covering all tokens before it.

hash(i) = XXH3-64(hash(i-1) as 8 bytes little-endian + the block's token ids as u32 little-endian, seed 1337);
the hash before the first block is `root_hash`. So equal hashes mean equal prefixes (and equal LoRA adapter
and cache salt), whatever engine holds the block. A block that images or embeddings are part of, whose token
ids are placeholders, has the engine's own name for them hashed too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import msgspec
from xxhash import xxh3_64_intdigest

from dynctl.errors import RequestError

SEED = 1337
TOKEN_BYTES = 4
OF_BYTES = 1 << 64
"""Set in a hash that stands for text no tokens are known of: it is nothing that an engine has told of."""


@lru_cache(maxsize=1024)
def root_hash(lora_name: str = "", cache_salt: str = "") -> int:
    """The hash before a prompt's first block (unsigned 64 bit): one per LoRA adapter and cache salt."""
    lora, salt = lora_name.encode(), cache_salt.encode()
    return xxh3_64_intdigest(len(lora).to_bytes(8, "little") + lora + salt, SEED)


def extra_bytes(keys: Sequence[object]) -> bytes:
    """What a block's hash depends on beside its tokens, as it is hashed: for each of its media the name and
    where it begins in the block, then digests of embeddings.
    """
    return msgspec.msgpack.encode(keys)


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as u32 little-endian. Raises RequestError for an id outside 0..2^32-1."""
    try:
        return struct.pack(f"<{len(tokens)}I", *tokens)
    except struct.error as error:
        raise RequestError(
            "a token id is outside the range of token ids", hint="valid: whole numbers 0..4294967295"
        ) from error


def sequence_hashes(tokens: Sequence[int] | bytes, block_size: int, root: int) -> list[int]:
    """The hash of each full block of `tokens`; the tail that fills no block has none.

    `tokens`: ids, or bytes already packed by `pack_tokens`. `block_size` in tokens, at least 1. `root`: from
    `root_hash`. Raises RequestError as `pack_tokens` does.
    """
    data = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
    size = block_size * TOKEN_BYTES
    digest, seed, parent = xxh3_64_intdigest, SEED, root
    hashes = []
    for start in range(0, len(data) - size + 1, size):
        parent = digest(parent.to_bytes(8, "little") + data[start : start + size], seed)
        hashes.append(parent)
    return hashes


def extend(
    parent_hash: int, tokens: Sequence[int] | bytes, block_size: int, extras: Sequence[bytes] = ()
) -> list[int]:
    """The hashes of the full blocks of `tokens` that follow the block `parent_hash`.

    `extras`: what else each block depends on, appended to what is hashed; () = nothing.
    """
    if not any(extras):
        return sequence_hashes(tokens, block_size, parent_hash)
    data = tokens if isinstance(tokens, bytes) else pack_tokens(tokens)
    size, parent, hashes = block_size * TOKEN_BYTES, parent_hash, []
    for number, extra in enumerate(extras):
        block = data[number * size : (number + 1) * size]
        parent = xxh3_64_intdigest(parent.to_bytes(8, "little") + block + extra, SEED)
        hashes.append(parent)
    return hashes
