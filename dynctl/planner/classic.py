"""The formula with correction factors that NVIDIA Dynamo's planner had at first, to compare with. Pure.

    N_p = ceil(R I / T * min(1, c_p) / (theta_p g_p))        N_d = ceil(R O / T / (theta_d g_d))

c_p, c_d: latencies seen by those expected. It measures completed requests, so saturation hides demand; the
planner does not use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """Predicted of the next `seconds`: requests, tokens of a prompt and of an answer."""

    seconds: float
    requests: float
    isl: float
    osl: float


@dataclass(frozen=True, slots=True)
class Sizes:
    """GPUs of a replica, fewest replicas of each, most GPUs in all (0 = no limit)."""

    prefill_gpus: int = 1
    decode_gpus: int = 1
    least: int = 1
    budget: int = 0


def itl_target(itl_s: float, correction: float) -> float:
    """The time between tokens to look up decode throughput at: the service level by its correction."""
    return itl_s / correction if correction > 0.0 else itl_s


def replicas(
    ahead: Interval, throughput: tuple[float, float], correction: float, sizes: Sizes
) -> tuple[int, int]:
    """(prefill, decode) replicas. `throughput`: tokens a second by GPU of each; `correction`: prefill's.

    Over the budget both go down in proportion, decode gets what is left.
    """
    by_gpu_p, by_gpu_d = throughput
    prompts = ahead.requests * ahead.isl / ahead.seconds * min(1.0, correction)
    answers = ahead.requests * ahead.osl / ahead.seconds
    prefill = max(sizes.least, math.ceil(prompts / (by_gpu_p * sizes.prefill_gpus)))
    decode = max(sizes.least, math.ceil(answers / (by_gpu_d * sizes.decode_gpus)))
    total = prefill * sizes.prefill_gpus + decode * sizes.decode_gpus
    if sizes.budget and total > sizes.budget:
        scale = sizes.budget / total
        room = (sizes.budget - sizes.least * sizes.decode_gpus) // sizes.prefill_gpus
        prefill = max(sizes.least, min(room, round(prefill * scale)))
        decode = max(sizes.least, (sizes.budget - prefill * sizes.prefill_gpus) // sizes.decode_gpus)
    return prefill, decode
