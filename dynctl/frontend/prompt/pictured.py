"""Blocks of prompts with images. Pure.

An image whose tokens an engine has shown (`kv.media`) is put in token for token, and the blocks are named as
the engine names them. From the first other one on nothing is known for certain: there hashes tell only that
prompts go on alike, as those of bytes do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xxhash import xxh32_intdigest

from dynctl.kv.hashing import OF_BYTES, TOKEN_BYTES, extend
from dynctl.kv.media import extras_of, put_in
from dynctl.protocol.kv_events import Runs

GUESSED_TOKENS = 576
"""What an image is taken for that no engine has shown: about what it is for the models there are."""


@dataclass(frozen=True, slots=True)
class Pictured:
    """`tokens` of the prompt, and hashes of its full blocks; not `exact`: from some block on both are
    guesses, and the last hash has `OF_BYTES`.
    """

    tokens: int
    hashes: list[int]
    exact: bool


def pictured(
    packed: bytes,
    image_token: int,
    names: Sequence[str],
    tokens_of: Callable[[str], Runs | None],
    block_size: int,
    root: int,
) -> Pictured | None:
    """The prompt whose tokens (packed u32) have one `image_token` in place of each of the images `names`.

    None when there are not as many. `block_size` 0: no hashes are wanted.
    """
    found = struct.unpack(f"<{len(packed) // TOKEN_BYTES}I", packed)
    places = [at for at, token in enumerate(found) if token == image_token]
    if len(places) != len(names):
        return None
    known = [tokens_of(name) for name in names]
    images = [
        (name, runs or [(xxh32_intdigest(name.encode()), GUESSED_TOKENS)])
        for name, runs in zip(names, known, strict=True)
    ]
    tokens, spans = put_in(found, places, images)
    guessed = [span.start for span, runs in zip(spans, known, strict=True) if runs is None]
    blocks = len(tokens) // block_size if block_size else 0
    if not blocks:
        return Pictured(len(tokens), [], not guessed)
    extras = extras_of(spans, blocks, block_size)
    hashes = extend(root, tokens, block_size, extras)
    if not guessed:
        return Pictured(len(tokens), hashes, True)
    sure = guessed[0] // block_size
    return Pictured(len(tokens), [*hashes[:sure], *(h | OF_BYTES for h in hashes[sure:])], False)
