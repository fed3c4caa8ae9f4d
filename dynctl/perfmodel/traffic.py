"""A demand as pools see it: a few prompts that stand for all, and the moments of lengths. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from dynctl.perfmodel.choice import Demand

_CUTS = (*(i / 20 for i in range(19)), 0.95, 0.97, 0.98, 0.985, 0.99, 0.993, 0.996, 0.998, 1.0)
"""Shares of the prompts, shortest first, between which they are taken together: finer at percentiles."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """`prompts`: (tokens, share of the requests), shortest first, shares adding up to 1.

    `answer`: mean tokens of an answer. `context`, `context_deviation`: tokens a sequence holds while its
    answer is written, seen at any moment. `longest`: most tokens one request needs.
    """

    prompts: tuple[tuple[float, float], ...]
    answer: float
    context: float
    context_deviation: float
    longest: int
    hit_rate: float


def traffic(demand: Demand) -> Traffic:
    """The demand, its rate apart. A long answer is seen for longer, so contexts are weighed by answers."""
    sizes = sorted(prompt for prompt, _ in demand.lengths)
    count = len(sizes)
    if sizes[0] == sizes[-1]:
        prompts: list[tuple[float, float]] = [(float(sizes[0]), 1.0)]
    else:
        edges = sorted({round(cut * count) for cut in _CUTS})
        parts = [sizes[a:b] for a, b in pairwise(edges)]
        prompts = [(fmean(part), len(part) / count) for part in parts]
    spoken = sum(answer for _, answer in demand.lengths)
    context = sum(answer * (prompt + answer / 2) for prompt, answer in demand.lengths) / spoken
    square = (
        sum(answer * (prompt**2 + prompt * answer + answer**2 / 3) for prompt, answer in demand.lengths)
        / spoken
    )
    return Traffic(
        prompts=tuple(prompts),
        answer=spoken / count,
        context=context,
        context_deviation=max(0.0, square - context**2) ** 0.5,
        longest=max(prompt + answer for prompt, answer in demand.lengths),
        hit_rate=demand.hit_rate,
    )
