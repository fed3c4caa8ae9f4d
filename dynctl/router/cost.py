"""The cost of placing a request on a worker, in KV blocks, and the choice of the cheapest.

    prefill = max(0, (tokens being prefilled + prompt tokens) / block_size - overlap_credit * overlap)
    decode  = blocks in use + the request's blocks that are not in use there yet
    cost    = prefill_load_scale * prefill + decode + decode_request_weight * requests

A role that only prefills has the prefill part alone. A role that only decodes has the decode part alone,
and no credit for overlap: its KV comes from the prefill worker whatever it holds. The formula is the one
published of NVIDIA Dynamo's KV router, without its decay, tier and taint terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from dynctl.protocol.instances import Role
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import RankLoad


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: its prompt in tokens and the blocks it will occupy, for one role."""

    role: Role
    prompt_tokens: int
    blocks: int
    block_size: int


Standing = tuple[RankLoad, int, int]
"""A worker: its load, blocks of the prompt cached there, blocks of the request in use there already."""


def costs(spec: RouterSpec, demand: Demand, standings: Iterable[Standing]) -> list[float]:
    """The cost in blocks on each of the workers that `standings` describe, in their order.

    Requests of others that wait there have unknown prompts: each counts as long as this one.
    """
    credit, scale, weight = spec.overlap_credit, spec.prefill_load_scale, spec.decode_request_weight
    prompt, size, blocks = demand.prompt_tokens, demand.block_size, demand.blocks
    prefills, decodes = demand.role != "decode", demand.role != "prefill"
    found = []
    for load, overlap, shared in standings:
        total = 0.0
        if prefills:
            tokens = load.prefill_tokens + (load.others_waiting + 1) * prompt
            prefill = tokens / size - credit * overlap
            if prefill > 0.0:
                total = scale * prefill
        if decodes:
            total += load.blocks + blocks - shared + weight * load.requests
        found.append(total)
    return found


def pick(prices: Sequence[float], temperature: float, rng: Random) -> int:
    """The index of the choice. Temperature 0: a lowest cost, ties broken by `rng`.

    Above 0: costs are scaled to 0..1 (lowest to highest) and drawn with weight exp(-cost / temperature).
    """
    low = min(prices)
    if temperature <= 0.0:
        return _any_of([i for i, value in enumerate(prices) if value == low], rng)
    span = max(prices) - low
    if span == 0.0:
        return rng.randrange(len(prices))
    weights = [math.exp(-(value - low) / span / temperature) for value in prices]
    return rng.choices(range(len(prices)), weights)[0]


def _any_of(indices: list[int], rng: Random) -> int:
    return indices[0] if len(indices) == 1 else indices[rng.randrange(len(indices))]
