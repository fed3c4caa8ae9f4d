"""When requests are sent. Pure: the same load gives the same times."""

from __future__ import annotations

import random
from collections.abc import Iterator

from dynctl.profiler.load.spec import Load, Open, Replay


def arrivals(load: Load) -> Iterator[float]:
    """Seconds from the start at which each request (or conversation) is to be sent, rising; the first at 0.

    It ends with the load's number of requests, unless it is to settle first, or with its duration. A closed
    loop has no such times: they are all 0. Gaps of an open loop are gamma distributed with mean 1/rate and
    squared coefficient of variation 1/burstiness, as `vllm bench serve` has them.
    """
    for number, at_s in enumerate(_times(load)):
        if load.total and number >= load.total and not load.settle:
            return
        if load.duration_s and at_s > load.duration_s:
            return
        yield at_s


def _times(load: Load) -> Iterator[float]:
    match load.arrivals:
        case Replay(requests=requests, speedup=speedup):
            begin_s = requests[0].at_s
            yield from ((request.at_s - begin_s) / speedup for request in requests)
        case Open() as rhythm:
            at_s = 0.0
            for gap_s in _gaps(rhythm, random.Random(f"{load.seed}/times")):
                yield at_s
                at_s += gap_s
        case _:
            while True:
                yield 0.0


def _gaps(rhythm: Open, rng: random.Random) -> Iterator[float]:
    if rhythm.burstiness is None:
        while True:
            yield 1 / rhythm.rate
    scale_s = 1 / (rhythm.rate * rhythm.burstiness)
    while True:
        yield rng.gammavariate(rhythm.burstiness, scale_s)
