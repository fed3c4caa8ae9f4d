"""What each layout can do within an SLA: the most requests a second, the fewest replicas for a rate. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from dynctl.perfmodel.choice import Demand, Option, Pool, Prediction, Refused, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.pools import Aggregated, Decode, Disaggregated, Reading, Talking
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.queueing import NO_WAIT, Routing, Wait
from dynctl.perfmodel.traffic import Traffic, traffic
from dynctl.protocol.instances import Role

T = TypeVar("T")

_BATCHED = (1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens a step of one rank may compute: what is tried."""
_FIRST_STEPS = 1.5
"""After a prompt's KV has come: the rest of the step that runs, half of it on average, and its own first."""
_FULL_LOAD = 0.95
"""How busy readers may be when nothing is asked of the time to first token."""
_FULL_LINK = 0.9
_CLOSE = 1e-3
_SAME = 0.99
"""Of budgets whose rates come so near to the highest the one with the earliest first tokens is taken."""
_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class Ask:
    """What to choose for. `profiles`: role → layout → costs of one replica; `gpus`: as many as there are.

    `most`: the highest rate that `gpus` serve is looked for, and the demand's rate is not looked at; else the
    fewest GPUs for the demand's rate. `fits`: whether pools (layout, replicas) can be laid out on the nodes.
    """

    sla: Sla
    demand: Demand
    profiles: Mapping[Role, Mapping[Layout, Profile]]
    gpus: int
    most: bool = False
    routing: Routing = "least_work"
    fits: Callable[[tuple[tuple[Layout, int], ...]], bool] = lambda pools: True
    refused: tuple[Refused, ...] = ()


def highest(fine: Callable[[float], bool], start: float) -> float:
    """The highest rate that is still fine, to one part in a thousand; 0 when none is. `start`: one to try."""
    low, high = 0.0, start
    while fine(high):
        low, high = high, high * 2.0
        if high > start * 2**40:
            return low
    if not low:
        while high > start * 1e-6 and not fine(high):
            high /= 2.0
        if high <= start * 1e-6:
            return 0.0
        low, high = high, high * 2.0
    while high - low > _CLOSE * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if fine(middle) else (low, middle)
    return low


def fewest(fine: Callable[[int], bool], most: int) -> int:
    """The smallest count, 1 to `most`, that is fine; 0 when none is. More are never worse."""
    if most < 1 or not fine(most):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fine(middle) else (middle, high)
    return high


class Offers:
    """All layouts of an ask under one traffic, with what was found out about them kept."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.mix: Traffic = traffic(ask.demand)
        self._rates: dict[tuple[object, ...], float] = {}

    @cached_property
    def readers(self) -> dict[Layout, Disaggregated]:
        """Layouts that read a prompt in time when alone, each with its best budget of tokens."""
        found = {}
        for layout, profile in self.ask.profiles.get("prefill", {}).items():
            tried = [
                Disaggregated(profile, self.mix, batched, self.ask.routing) for batched in budgets(profile)
            ]
            rates = [highest(lambda rate, one=one: self.reads(one, rate, 1, 0.0), 1.0) for one in tried]  # type: ignore[misc]
            if max(rates):
                found[layout] = self._quickest(tried, rates, lambda one, rate: one.reading(rate, 1))
        return found

    @cached_property
    def writers(self) -> dict[Layout, Decode]:
        """Layouts that write at least one answer in time."""
        made = {
            layout: Decode(profile, self.mix, self.ask.sla.itl_s)
            for layout, profile in self.ask.profiles.get("decode", {}).items()
        }
        return {layout: one for layout, one in made.items() if one.seats}

    @cached_property
    def both(self) -> dict[Layout, Aggregated]:
        """Layouts that do both in time when alone, each with its best budget of tokens."""
        found = {}
        for layout, profile in self.ask.profiles.get("aggregated", {}).items():
            tried = [
                Aggregated(profile, self.mix, batched, self.ask.sla.itl_s, self.ask.routing)
                for batched in budgets(profile)
            ]
            rates = [highest(lambda rate, one=one: self.does_both(one, rate, 1), 1.0) for one in tried]  # type: ignore[misc]
            if max(rates):
                found[layout] = self._quickest(tried, rates, self._first_of_both)
        return found

    def _quickest(
        self, tried: Sequence[T], rates: Sequence[float], reading: Callable[[T, float], Reading | None]
    ) -> T:
        """Of those with about the highest rate."""
        rate = _SAME * max(rates)

        def ttft_s(one: T) -> float:
            found = reading(one, rate)
            return found.ttft_s(self.ask.sla.percentile) if found else math.inf

        return min((one for one, its in zip(tried, rates, strict=True) if its >= rate), key=ttft_s)

    def _first_of_both(self, one: Aggregated, rate: float) -> Reading | None:
        found = one.both(rate, 1, self.ask.sla.percentile)
        return found[0] if found else None

    def in_time(self, reading: Reading | None) -> bool:
        """Whether enough of the first tokens come in time."""
        if reading is None:
            return False
        if self.ask.sla.ttft_s is None:
            return reading.load <= _FULL_LOAD
        return reading.late(self.ask.sla.ttft_s) <= 1.0 - self.ask.sla.percentile

    def reads(
        self, reader: Disaggregated, rate: float, replicas: int, after_s: float, seat: Wait = NO_WAIT
    ) -> bool:
        """Whether so many replicas read in time, and their links carry the KV. `seat`: for writers."""
        if reader.link_load(rate, replicas) > _FULL_LINK:
            return False
        return self.in_time(reader.reading(rate, replicas, after_s, seat))

    def writes(self, writer: Decode, rate: float, replicas: int) -> Talking | None:
        """How so many replicas write; None when not in time."""
        return writer.talking(rate, replicas, self.ask.sla.percentile)

    def does_both(self, one: Aggregated, rate: float, replicas: int) -> bool:
        """Whether so many replicas read and write in time."""
        found = one.both(rate, replicas, self.ask.sla.percentile)
        return found is not None and self.in_time(found[0])

    def after_s(self, writer: Decode) -> float:
        """From the arrival of a prompt's KV to its first token, at workers as full as they may be."""
        return _FIRST_STEPS * writer.steps[writer.seats]

    def reading_rate(self, layout: Layout, replicas: int, after_s: float) -> float:
        """The highest rate that these readers take."""
        reader = self.readers[layout]
        return self._kept(
            ("prefill", layout, replicas, after_s), lambda rate: self.reads(reader, rate, replicas, after_s)
        )

    def writing_rate(self, layout: Layout, replicas: int) -> float:
        """The highest rate that these writers take."""
        writer = self.writers[layout]
        return self._kept(
            ("decode", layout, replicas), lambda rate: self.writes(writer, rate, replicas) is not None
        )

    def rate_of_split(self, first: tuple[Layout, int], second: tuple[Layout, int]) -> float:
        """The highest rate that these readers and writers take, waits for a seat counted; no more than either
        takes alone.
        """
        reader, writer = self.readers[first[0]], self.writers[second[0]]
        after_s = self.after_s(writer)
        most = min(self.reading_rate(*first, after_s), self.writing_rate(*second))

        def fine(rate: float) -> bool:
            talking = self.writes(writer, rate, second[1]) if rate <= most else None
            return talking is not None and self.reads(reader, rate, first[1], after_s, talking.seat)

        if not most or fine(most):
            return most
        return self._kept(("split", *first, *second), fine, most / 2.0)

    def rate_of_both(self, layout: Layout, replicas: int) -> float:
        """The highest rate that these take, who do both."""
        one = self.both[layout]
        return self._kept(("aggregated", layout, replicas), lambda rate: self.does_both(one, rate, replicas))

    def _kept(self, key: tuple[object, ...], fine: Callable[[float], bool], start: float = 1.0) -> float:
        if key not in self._rates:
            self._rates[key] = highest(fine, start)
        return self._rates[key]

    def split(self, first: tuple[Layout, int], second: tuple[Layout, int], rate: float) -> Option:
        """Readers and writers at a rate that both take; with its capacity."""
        reader, writer = self.readers[first[0]], self.writers[second[0]]
        after = self.after_s(writer)
        talking = self.writes(writer, rate, second[1])
        assert talking is not None
        reading = reader.reading(rate, first[1], after, talking.seat)
        assert reading is not None
        capacity = max(rate, self.rate_of_split(first, second))
        seats = writer.allowed(capacity, second[1])
        pools = (
            _pool("prefill", first, _sequences(reader.profile), reader.batched, reading.load),
            _pool("decode", second, seats, max(seats, _budget(writer.profile)), talking.load),
        )
        return self._option(pools, reading, talking, (rate, capacity))

    def together(self, pool: tuple[Layout, int], rate: float) -> Option:
        """Workers that do both, at a rate that they take; with its capacity."""
        one = self.both[pool[0]]
        found = one.both(rate, pool[1], self.ask.sla.percentile)
        assert found is not None
        load = max(found[0].load, found[1].load)
        capacity = max(rate, self.rate_of_both(*pool))
        pools = (_pool("aggregated", pool, one.decode.allowed(capacity, pool[1]), one.batched, load),)
        return self._option(pools, *found, (rate, capacity))

    def _option(
        self, pools: tuple[Pool, ...], reading: Reading, talking: Talking, rates: tuple[float, float]
    ) -> Option:
        rate, capacity = rates
        gpus = sum(pool.gpus for pool in pools)
        predicted = Prediction(
            ttft_s=reading.ttft_s(self.ask.sla.percentile),
            itl_s=talking.itl_s,
            capacity=capacity,
            tokens_per_s_per_gpu=rate * self.mix.answer / gpus,
            tokens_per_s_per_user=1.0 / talking.itl_s,
        )
        return Option(
            mode="aggregated" if len(pools) == 1 else "disaggregated", pools=pools, predicted=predicted
        )


def budgets(profile: Profile) -> list[int]:
    """Tokens a step of a replica may compute, what is tried of them: up to the profile's limit, and what was
    measured with that limit is known of no other.
    """
    ranks = profile.subject.layout.data if profile.subject else 1
    most = _budget(profile)
    if profile.source == "measured":
        return [most]
    return [size * ranks for size in _BATCHED if size * ranks <= most] or [most]


def _budget(profile: Profile) -> int:
    return profile.limits.batched_tokens if profile.limits else _BATCHED[-3]


def _sequences(profile: Profile) -> int:
    return min(_SEQUENCES, profile.limits.sequences) if profile.limits else _SEQUENCES


def _pool(role: Role, pool: tuple[Layout, int], sequences: int, batched: int, load: float) -> Pool:
    return Pool(
        role=role,
        layout=pool[0],
        replicas=pool[1],
        sequences=sequences,
        batched_tokens=batched,
        load=load,
    )
