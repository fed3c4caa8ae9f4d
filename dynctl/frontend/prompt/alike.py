"""Hashes of a request's bytes, for prompts of which there are no tokens: begin alike, hashed alike. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from dynctl.frontend.body import Body
from dynctl.kv.hashing import OF_BYTES

TOKEN_BYTES = 4
"""Bytes of JSON text taken for a token: about right for English."""
DEFAULT_BLOCK_SIZE = 16
_SEED = 7331
_MOST = 4096
_INLINE = b'"data:'
_INLINE_LEAST = 4096
_INLINE_BYTES = 576 * TOKEN_BYTES
"""What media in the request itself are taken for: what engines make of them does not go by their size."""
_FIELDS = ("system", "instructions", "tools", "messages", "prompt", "query", "input", "documents", "text")
"""What a prompt is made of, in the order in which it is put together."""


def alike(body: Body, block_size: int, root: int) -> tuple[list[int], int]:
    """One hash for each `block_size` tokens' worth of the prompt's bytes, covering all before, and how many
    tokens these may be. At most 4096 hashes, all with `OF_BYTES`.

    `block_size` in tokens, 0 = not known. `root`: from `kv.hashing.root_hash`.
    """
    size = TOKEN_BYTES * (block_size or DEFAULT_BLOCK_SIZE)
    data = b"".join(bytes(body.fields[name]) for name in _FIELDS if name in body.fields)
    if _INLINE in data:
        data = b"".join(_shortened(data))
    parent, hashes = root, []
    for start in range(0, min(len(data) - size + 1, _MOST * size), size):
        parent = xxh3_64_intdigest(parent.to_bytes(8, "little") + data[start : start + size], _SEED)
        hashes.append(parent | OF_BYTES)
    return hashes, min(len(data), _MOST * size) // TOKEN_BYTES


def _shortened(data: bytes) -> Iterator[bytes]:
    """The same, with a digest in place of each long string that is a data URL."""
    at, find = 0, data.find
    while (start := find(_INLINE, at)) >= 0 and (end := find(b'"', start + 1)) >= 0:
        if end - start < _INLINE_LEAST:
            yield data[at:end]
        else:
            name = xxh3_128_hexdigest(data[start:end]).encode()
            yield data[at:start]
            yield (name * (_INLINE_BYTES // len(name)))[:_INLINE_BYTES]
        at = end
    yield data[at:]
