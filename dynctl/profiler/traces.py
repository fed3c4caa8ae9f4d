"""Recorded requests as a demand: lengths, rate, and how much of the prompts had been seen before."""

from __future__ import annotations

from collections.abc import Sequence

from dynctl.errors import ProfileError
from dynctl.perfmodel.choice import Demand
from dynctl.perfmodel.trace import BLOCK_TOKENS, TraceRequest


def demand_of(lines: Sequence[TraceRequest], where: str, rate: float | None = None) -> Demand:
    """What they ask for; `rate` instead of their own. Raises ProfileError when they tell none.

    The hit rate is that of a cache without end that all share: the most that routing can reach.
    """
    if rate is None:
        span_s = lines[-1].at_s - lines[0].at_s
        if span_s <= 0.0:
            raise ProfileError(
                "the trace tells no rate: all its requests come at one time", where=where, hint="give --rate"
            )
        rate = (len(lines) - 1) / span_s
    return Demand(
        rate=rate,
        lengths=tuple((line.prompt_tokens, line.output_tokens) for line in lines),
        hit_rate=hit_rate(lines),
    )


def hit_rate(lines: Sequence[TraceRequest]) -> float:
    """Share of all prompt tokens whose block, and all before it, an earlier request had."""
    seen: set[int] = set()
    found = total = 0
    for line in lines:
        total += line.prompt_tokens
        known = 0
        for block in line.blocks:
            if block not in seen:
                break
            known += BLOCK_TOKENS
        found += min(known, line.prompt_tokens - 1)
        seen.update(line.blocks)
    return found / total
