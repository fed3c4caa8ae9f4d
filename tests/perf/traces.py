"""Request traces made up in the likeness of Mooncake's, and what routers could reach on them."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from dynctl.perfmodel.trace import BLOCK_TOKENS, TraceRequest


def prompt_of(request: TraceRequest, vocabulary: int) -> list[int]:
    """Token ids below `vocabulary` (8 are kept free): the same for the same leading blocks."""
    ids: list[int] = []
    for block in request.blocks:
        rng = Random(block)
        ids += [8 + rng.randrange(vocabulary - 8) for _ in range(BLOCK_TOKENS)]
    return ids[: request.prompt_tokens]


def made_up(count: int, seed: int = 1) -> list[TraceRequest]:
    """Conversations over a few shared openings, their popularity falling as 1/rank; 3.9 requests a second.

    Prompts grow by turns, answers are short: mean prompt about 12,000 tokens, half or more of it seen before.
    """
    rng = Random(seed)
    fresh = iter(range(1, 1 << 60))
    openings = [tuple(next(fresh) for _ in range(rng.choice((1, 2, 4, 16)))) for _ in range(12)]
    weights = [1 / rank for rank in range(1, len(openings) + 1)]
    talks: list[tuple[int, ...]] = []
    found, at_s = [], 0.0
    for _ in range(count):
        at_s += rng.expovariate(3.9)
        if talks and rng.random() < 0.6:
            place = rng.randrange(max(0, len(talks) - 64), len(talks))
            before = talks[place]
        else:
            place, before = len(talks), rng.choices(openings, weights)[0]
            talks.append(before)
        blocks = before + tuple(next(fresh) for _ in range(max(1, round(rng.lognormvariate(1.9, 1.0)))))
        talks[place] = blocks
        partial = rng.randrange(1, BLOCK_TOKENS + 1)
        output = max(1, min(600, round(rng.lognormvariate(4.2, 1.1))))
        found.append(TraceRequest(at_s, (len(blocks) - 1) * BLOCK_TOKENS + partial, output, blocks))
    return found


def oracle_hits(requests: Sequence[TraceRequest], workers: int, cache_blocks: int, size: int) -> float:
    """Share of prompt tokens found cached by a router that sees every cache and always takes the longest
    match, of those the least used worker. `cache_blocks` of `size` tokens per worker, oldest dropped first;
    a prompt is in the cache as soon as it has been placed. `size` divides `BLOCK_TOKENS`.
    """
    caches: list[dict[tuple[int, int], None]] = [{} for _ in range(workers)]
    placed = [0] * workers
    hits = total = 0
    for request in requests:
        keys = [(block, part) for block in request.blocks for part in range(BLOCK_TOKENS // size)]
        keys = keys[: (request.prompt_tokens - 1) // size]
        depths = [_depth(cache, keys) for cache in caches]
        chosen = max(range(workers), key=lambda i: (depths[i], -placed[i]))
        hits += depths[chosen] * size
        total += request.prompt_tokens
        placed[chosen] += request.prompt_tokens - depths[chosen] * size
        cache = caches[chosen]
        for key in reversed(keys):
            cache.pop(key, None)
            cache[key] = None
        while len(cache) > cache_blocks:
            del cache[next(iter(cache))]
    return hits / total


def _depth(cache: dict[tuple[int, int], None], keys: list[tuple[int, int]]) -> int:
    return next((i for i, key in enumerate(keys) if key not in cache), len(keys))
