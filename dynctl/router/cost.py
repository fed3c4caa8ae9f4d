"""The cost of placing a request on a worker, in KV blocks, and the choice of the cheapest.

    excess  = (tokens to prefill there - the least of all workers) / prompt tokens
    credit  = overlap_credit / (1 + overlap_decay * excess) * (overlap on the device
              + host_tier_credit * what only its host memory adds
              + disk_tier_credit * what only its disk adds)
    prefill = (tokens to prefill there + prompt tokens + tokens that loading the adapter is worth)
              / block_size - credit
    decode  = blocks in use + the request's blocks that are not in use there yet
    cost    = prefill_load_scale * prefill + decode + decode_request_weight * requests

A role that only prefills has the prefill part alone. A role that only decodes has the decode part alone,
and no credit for overlap: its KV comes from the prefill worker whatever it holds. The formula is the one
published of NVIDIA Dynamo's KV router without its taints, and with one difference: prefill may fall below 0,
so that a credit above 1 still tells a worker with a queue from one without. A credit above 1 is right under
load: tokens that are computed once more delay all who wait, not this request alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import msgspec

from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import RankLoad


# gc=False: numbers only, so it can be part of no cycle.
class Demand(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for: its prompt in tokens, the blocks it will occupy, and which parts count."""

    prompt_tokens: int
    blocks: int
    block_size: int
    prefills: bool = True
    decodes: bool = True


class Standings(NamedTuple):
    """The workers, one entry for each: its load, blocks of the prompt cached there (weighed by tier), blocks
    of the request in use there already, tokens that loading what the request needs is worth (None = 0 for
    all).
    """

    loads: Sequence[RankLoad]
    cached: Sequence[float]
    shared: Sequence[int]
    extra_tokens: Sequence[int] | None = None


def costs(spec: RouterSpec, demand: Demand, workers: Standings) -> list[float]:
    """The cost in blocks on each of the workers, in their order.

    Requests of others that wait there have unknown prompts: each counts as long as this one.
    """
    prompt, loads = demand.prompt_tokens, workers.loads
    totals = [0.0] * len(loads)
    if demand.prefills:
        queued = [load.prefill_tokens + load.others_waiting * prompt for load in loads]
        least = min(queued)
        if workers.extra_tokens is not None:
            queued = [tokens + extra for tokens, extra in zip(queued, workers.extra_tokens, strict=True)]
        totals = _prefill(spec, demand, queued, workers.cached, least)
    if demand.decodes:
        blocks, weight = demand.blocks, spec.decode_request_weight
        totals = [
            total + load.blocks + (blocks - shared)
            for total, load, shared in zip(totals, loads, workers.shared, strict=True)
        ]
        if weight:
            totals = [total + weight * load.requests for total, load in zip(totals, loads, strict=True)]
    return totals


def _prefill(
    spec: RouterSpec, demand: Demand, queued: Sequence[int], cached: Sequence[float], least: int
) -> list[float]:
    """The prefill part. `queued`: tokens to compute before this prompt; `least` of them anywhere."""
    scale, credit = spec.prefill_load_scale, spec.overlap_credit
    per_token, prompt = scale / demand.block_size, demand.prompt_tokens
    if not spec.overlap_decay:
        credit *= scale
        return [
            (tokens + prompt) * per_token - credit * blocks
            for tokens, blocks in zip(queued, cached, strict=True)
        ]
    decay = spec.overlap_decay / max(1, prompt)
    return [
        (tokens + prompt) * per_token - scale * credit / (1.0 + decay * (tokens - least)) * blocks
        for tokens, blocks in zip(queued, cached, strict=True)
    ]


def pick(prices: Sequence[float], temperature: float, rng: Random) -> int:
    """The index of the choice. Temperature 0: a lowest cost, ties broken by `rng`.

    Above 0: costs are scaled to 0..1 (lowest to highest) and drawn with weight exp(-cost / temperature).
    """
    low = min(prices)
    if temperature <= 0.0:
        if prices.count(low) == 1:
            return prices.index(low)
        ties = [i for i, value in enumerate(prices) if value == low]
        return ties[rng.randrange(len(ties))]
    span = max(prices) - low
    if span == 0.0:
        return rng.randrange(len(prices))
    weights = [math.exp(-(value - low) / span / temperature) for value in prices]
    return rng.choices(range(len(prices)), weights)[0]
