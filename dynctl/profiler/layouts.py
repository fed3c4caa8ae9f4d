"""Which layouts come into question for a model, an engine and so many GPUs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dynctl.perfmodel.layout import Layout

_MOST_RANKS = 32
"""GPUs over which the experts of one replica are spread at most."""


@dataclass(frozen=True, slots=True)
class Space:
    """What bounds the candidates: GPUs in all and on a node, whether the model has experts.

    `stages`: those cut into stages over nodes, instead of all others.
    """

    gpus: int
    per_node: int
    experts: bool = False
    stages: bool = False


def candidates(space: Space) -> tuple[Layout, ...]:
    """In a fixed order: tensor parallel within a node; with experts, also spread over ranks.

    Whether the model's sizes divide and fit is not looked at here.
    """
    return tuple(sorted(set(_all(space)), key=lambda layout: (layout.gpus, layout)))


def _all(space: Space) -> Iterator[Layout]:
    most = min(space.gpus, space.per_node)
    if space.stages:
        for stages in (2, 4):
            if stages * space.per_node <= space.gpus:
                yield Layout(tensor=space.per_node, pipeline=stages)
        return
    for tensor in _doublings(most):
        yield Layout(tensor=tensor)
        if space.experts and tensor > 1:
            yield Layout(tensor=tensor, expert=tensor)
        for ranks in _doublings(min(space.gpus, _MOST_RANKS) // tensor) if space.experts else ():
            if ranks > 1:
                yield Layout(tensor=tensor, data=ranks, expert=tensor * ranks)


def _doublings(most: int) -> Iterator[int]:
    size = 1
    while size <= most:
        yield size
        size *= 2
