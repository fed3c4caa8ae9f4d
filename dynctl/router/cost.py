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
from collections.abc import Sequence
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


def cost(spec: RouterSpec, demand: Demand, load: RankLoad, overlap: int, shared: int) -> float:
    """The cost in blocks. `overlap`: blocks of the prompt cached there; `shared`: blocks in use there now.

    Requests of others that wait there have unknown prompts: each counts as long as this one.
    """
    total = 0.0
    if demand.role != "decode":
        tokens = load.prefill_tokens + (load.others_waiting + 1) * demand.prompt_tokens
        prefill = tokens / demand.block_size - spec.overlap_credit * overlap
        if prefill > 0.0:
            total = spec.prefill_load_scale * prefill
    if demand.role != "prefill":
        total += load.blocks + demand.blocks - shared + spec.decode_request_weight * load.requests
    return total


def pick(costs: Sequence[float], temperature: float, rng: Random) -> int:
    """The index of the choice. Temperature 0: a lowest cost, ties broken by `rng`.

    Above 0: costs are scaled to 0..1 (lowest to highest) and drawn with weight exp(-cost / temperature).
    """
    low = min(costs)
    if temperature <= 0.0:
        return _any_of([i for i, value in enumerate(costs) if value == low], rng)
    span = max(costs) - low
    if span == 0.0:
        return rng.randrange(len(costs))
    weights = [math.exp(-(value - low) / span / temperature) for value in costs]
    return rng.choices(range(len(costs)), weights)[0]


def _any_of(indices: list[int], rng: Random) -> int:
    return indices[0] if len(indices) == 1 else indices[rng.randrange(len(indices))]
