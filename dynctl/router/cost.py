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
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import RankLoad


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks for: its prompt in tokens, the blocks it will occupy, and which parts count."""

    prompt_tokens: int
    blocks: int
    block_size: int
    prefills: bool = True
    decodes: bool = True


class Standing(NamedTuple):
    """A worker: its load, blocks of the prompt cached there (weighed by tier), blocks of the request in use
    there already, tokens that loading what the request needs is worth.
    """

    load: RankLoad
    cached: float = 0.0
    shared: int = 0
    extra_tokens: int = 0


def costs(spec: RouterSpec, demand: Demand, standings: Sequence[Standing]) -> list[float]:
    """The cost in blocks on each of the workers that `standings` describe, in their order.

    Requests of others that wait there have unknown prompts: each counts as long as this one.
    """
    prompt, size = demand.prompt_tokens, demand.block_size
    totals = [0.0] * len(standings)
    if demand.prefills:
        queued = [one.prefill_tokens + one.others_waiting * prompt for one, _, _, _ in standings]
        credit, decay, least = spec.overlap_credit, spec.overlap_decay / max(1, prompt), min(queued)
        scale = spec.prefill_load_scale
        totals = [
            scale * ((tokens + prompt + extra) / size - cached * credit / (1.0 + decay * (tokens - least)))
            for tokens, (_, cached, _, extra) in zip(queued, standings, strict=True)
        ]
    if demand.decodes:
        blocks, weight = demand.blocks, spec.decode_request_weight
        totals = [
            total + load.blocks + blocks - shared + weight * load.requests
            for total, (load, _, shared, _) in zip(totals, standings, strict=True)
        ]
    return totals


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
