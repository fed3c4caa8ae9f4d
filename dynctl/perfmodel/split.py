"""The choice: which layouts, how many replicas of each, prefill and decode apart or together. Pure.

Every pair of layouts and every layout alone is looked at; of each the counts that serve the rate with the
fewest GPUs, or the highest rate with the GPUs there are. The same ask gives the same choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from dynctl.perfmodel.choice import Choice, Option, Variation
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask, Offers, fewest
from dynctl.perfmodel.queueing import Wait
from dynctl.perfmodel.unmet import nearest, why_not

_SHOWN = 5
_SAME = 1.01
"""Rates that differ by less than this count as the same: then fewer GPUs win."""
_AT_MOST = 0.999
_VARIED = (0.8, 1.2)


def choose(ask: Ask) -> Choice:
    """The best option, the next best ones, and what would change it."""
    offers = Offers(ask)
    found = _ranked(offers)
    shown = tuple(_shown(found))
    if not shown:
        return Choice(
            sla=ask.sla,
            demand=ask.demand.scaled(rate=0.0) if ask.most else ask.demand,
            chosen=None,
            options=nearest(offers),
            refused=ask.refused,
            why=why_not(offers, rate_limit=_limit(ask)),
        )
    best = shown[0]
    rate = best.predicted.capacity if ask.most else ask.demand.rate
    demand = ask.demand.scaled(rate=rate / ask.demand.rate)
    return Choice(
        sla=ask.sla,
        demand=demand,
        chosen=best,
        options=shown,
        refused=ask.refused,
        sensitivity=tuple(_variations(replace(ask, demand=demand), best)),
    )


def best(ask: Ask) -> Option | None:
    """The best option alone, None when nothing keeps the SLA: what `choose` chooses, in less time."""
    return next(iter(_ranked(Offers(ask))), None)


def keeps(ask: Ask, option: Option) -> bool:
    """Whether the option's pools, as they are, keep the SLA at the demand's rate."""
    offers, rate = Offers(ask), ask.demand.rate * _AT_MOST
    first, second = option.pools[0], option.pools[-1]
    if option.mode == "aggregated":
        return first.layout in offers.both and offers.rate_of_both(first.layout, first.replicas) >= rate
    if first.layout not in offers.readers or second.layout not in offers.writers:
        return False
    pools = (first.layout, first.replicas), (second.layout, second.replicas)
    return offers.rate_of_split(*pools) >= rate


def _ranked(offers: Offers) -> list[Option]:
    """All options worth a look, best first, that can be laid out on the nodes."""
    ask = offers.ask
    made = [*_most(offers)] if ask.most else [*_least(offers, ask.gpus)]
    made.sort(key=_by_rate if ask.most else _by_gpus)
    return [one for one in made if ask.fits(tuple((pool.layout, pool.replicas) for pool in one.pools))]


def _by_gpus(option: Option) -> tuple[object, ...]:
    return option.gpus, -option.predicted.capacity, option.predicted.ttft_s, option.label


def _by_rate(option: Option) -> tuple[object, ...]:
    step = math.floor(math.log(option.predicted.capacity) / math.log(_SAME))
    return -step, option.gpus, -option.predicted.capacity, option.label


def _shown(found: list[Option]) -> Iterator[Option]:
    """The first few, and the best of each mode."""
    first = found[:_SHOWN]
    yield from first
    for mode in ("aggregated", "disaggregated"):
        if all(one.mode != mode for one in first):
            yield from [one for one in found if one.mode == mode][:1]


def _least(offers: Offers, gpus: int) -> Iterator[Option]:
    """For each pair of layouts, and each alone, the fewest replicas for the rate, within so many GPUs."""
    rate = offers.ask.demand.rate
    for layout, one in offers.both.items():
        count = fewest(lambda n, one=one: offers.does_both(one, rate, n), gpus // layout.gpus)  # type: ignore[misc]
        if count:
            yield offers.together((layout, count), rate)
    for second, writer in offers.writers.items():
        written = fewest(
            lambda n, one=writer: offers.writes(one, rate, n) is not None,  # type: ignore[misc]
            gpus // second.gpus,
        )
        left = gpus - written * second.gpus
        talking = offers.writes(writer, rate, written) if written else None
        for first in offers.readers if talking else ():
            assert talking is not None
            read = _readers(offers, (first, second), talking.seat, left)
            if read:
                yield offers.split((first, read), (second, written), rate)


def _readers(offers: Offers, layouts: tuple[Layout, Layout], seat: Wait, gpus: int) -> int:
    """The fewest replicas of the first layout that read in time for the second, where answers wait so for a
    `seat`, within so many GPUs; 0 = none.
    """
    reader, after = offers.readers[layouts[0]], offers.after_s(offers.writers[layouts[1]])
    rate = offers.ask.demand.rate
    return fewest(lambda n: offers.reads(reader, rate, n, after, seat), gpus // layouts[0].gpus)


def _most(offers: Offers) -> Iterator[Option]:
    """For each pair of layouts, and each alone, the counts with the highest rate on the GPUs there are."""
    gpus = offers.ask.gpus
    for layout in offers.both:
        if count := gpus // layout.gpus:
            rate = offers.rate_of_both(layout, count)
            yield offers.together((layout, count), rate * _AT_MOST)
    best = 0.0
    for second, writer in offers.writers.items():
        after = offers.after_s(writer)
        for first in offers.readers:
            found = _best_counts(offers, first, second, after, best)
            if found:
                read, written, rate = found
                best = max(best, rate)
                yield offers.split((first, read), (second, written), rate * _AT_MOST)


def _best_counts(
    offers: Offers, first: Layout, second: Layout, after: float, best: float
) -> tuple[int, int, float] | None:
    """Replicas of both and their rate; None when it is far below `best`, or nothing is left to one of them.

    More readers take more and leave less to the writers: where one line crosses the other is the best.
    """
    gpus = offers.ask.gpus

    def writing(read: int) -> float:
        left = (gpus - read * first.gpus) // second.gpus
        return offers.writing_rate(second, left) if left else 0.0

    def reading(read: int) -> float:
        return offers.reading_rate(first, read, after)

    most = (gpus - second.gpus) // first.gpus
    if most < 1 or writing(1) < best / 2.0:
        return None
    crossing = fewest(lambda read: reading(read) >= writing(read), most) or most
    tried = [read for read in (crossing - 1, crossing) if read >= 1]
    rates = [
        offers.rate_of_split((first, read), (second, (gpus - read * first.gpus) // second.gpus))
        for read in tried
    ]
    rate = max(rates)
    if rate <= 0.0 or rate < best / 2.0:
        return None
    read = tried[rates.index(rate)]
    written = fewest(
        lambda n: offers.rate_of_split((first, read), (second, n)) >= rate * _AT_MOST,
        (gpus - read * first.gpus) // second.gpus,
    )
    return read, written, rate


def _limit(ask: Ask) -> tuple[Option | None, int]:
    """What the GPUs there are serve at most, and how many GPUs the rate would take (0: none do)."""
    if ask.most:
        return None, 0
    offers = Offers(ask)
    most = min(_most(offers), key=_by_rate, default=None)
    more = [option.gpus for option in _least(offers, ask.gpus * 64)] if most else []
    return most, min(more, default=0)


def _variations(ask: Ask, chosen: Option) -> Iterator[Variation]:
    for what in ("isl", "osl", "rate"):
        for factor in _VARIED:
            varied = replace(ask, demand=ask.demand.scaled(**{what: factor}), most=False)
            found, holds = _ranked(Offers(varied)), keeps(varied, chosen)
            if holds:  # at its very limit, where no other is found
                found = found or [chosen]
            yield Variation(what=what, factor=factor, option=found[0] if found else None, holds=holds)
