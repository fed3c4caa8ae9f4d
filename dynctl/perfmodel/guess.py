"""The likeliest pools behind a row that states only how many GPUs one worker of each has. Pure.

After what the measured deployments do that state all: few requests a GPU are decoded by about four workers of
tensor parallelism, many by attention ranks, of which one worker has up to 32; there are more prefill workers
the more prompt tokens are in flight.
"""

from __future__ import annotations

import math

import msgspec

from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.memory import weights_bytes
from dynctl.perfmodel.work import Machine

NODE = 8
"""GPUs beyond which tensor parallelism is not guessed."""
CROWDED = 16.0
"""Requests a GPU from which decoding is taken to be by attention ranks."""
_WIDEST = 256
_MOST_READERS = 4
_READERS_SHARE = 400.0


class Pools(msgspec.Struct, frozen=True, kw_only=True):
    """Layouts of one worker of each pool, workers of (prefill, decode)."""

    prefill: Layout
    decode: Layout
    workers: tuple[int, int]


def guessed_pools(machine: Machine, gpus: tuple[int, int], isl: int, concurrency: float) -> Pools:
    """For workers of so many GPUs in the (prefill, decode) pool; `machine.layout` is not looked at.

    A worker whose GPUs could not hold the model's weights is taken to be as wide as it must.
    """
    readers = max(1, min(_MOST_READERS, round(isl / 8192 * concurrency / _READERS_SHARE)))
    prefill = _worker(machine, gpus[0], crowded=False)
    decode = _worker(machine, gpus[1], crowded=concurrency / gpus[1] >= CROWDED)
    ranks = decode.data
    decoders = 4 if ranks == 1 else 2 if ranks <= NODE else 1
    return Pools(prefill=prefill, decode=decode, workers=(readers, decoders))


def spread(gpus: int) -> Layout:
    """Attention ranks on all of so many GPUs, the experts over them; rounded down to a power of two."""
    wide = 2 ** int(math.log2(gpus))
    return Layout(data=wide, expert=wide)


def _worker(machine: Machine, gpus: int, *, crowded: bool) -> Layout:
    size = 2 ** int(math.log2(gpus))
    if machine.shape.experts is None:
        return Layout(tensor=size)
    while size < _WIDEST and _weights(machine, size) > machine.gpu.memory_bytes:
        size *= 2
    return spread(size) if crowded or size > NODE else Layout(tensor=size)


def _weights(machine: Machine, gpus: int) -> float:
    return weights_bytes(machine.shape, machine.precision, Layout(tensor=gpus))
