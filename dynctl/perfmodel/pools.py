"""What users get of a pool of workers at a rate: time to first token and time between tokens. Pure.

The engine is the one of continuous batching: steps that read at most so many prompt tokens, first come first
served, and give each sequence in the batch one token (`Profile.step_s` tells how long). A request's ITL is
the mean gap between its tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.queueing import (
    NO_WAIT,
    InFlight,
    Routing,
    Service,
    Wait,
    crossing,
    in_flight,
    waits,
)
from dynctl.perfmodel.traffic import Traffic

_MOST_SEQUENCES = 1024
_KV_SHARE = 0.99
"""At so many moments the KV of all that are in flight has to fit."""
_SEATED = 0.999
"""At so many moments whoever comes finds a seat, as far as the KV has room."""
_POOLED_SEATS = 2048
"""So many seats are looked at together; with more, chance evens out no further that matters."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Prompts waiting at workers: the wait in the queue, and what comes on top of it by length of the prompt.

    `points`: (seconds from its turn to its first token, share of the requests). `seat`: the wait for a place
    in the batch of who writes the answer.
    """

    wait: Wait
    points: tuple[tuple[float, float], ...]
    load: float
    seat: Wait = NO_WAIT

    def late(self, time_s: float) -> float:
        """Share of the requests whose first token comes later than that; waiting for both counts as the
        longer wait: few wait for a seat, or the service level is not kept.
        """
        return sum(
            share * min(1.0, self.wait.tail(time_s - own) + self.seat.tail(time_s - own))
            for own, share in self.points
        )

    def ttft_s(self, share: float) -> float:
        """The time in which that share of them has its first token."""
        return crossing(self.late, 1.0 - share, max(own for own, _ in self.points))


@dataclass(frozen=True, slots=True)
class Talking:
    """Answers being written. `mean`: sequences in a worker's batch; `step_s`: of its steps, on average.

    `seat`: the wait for a place in a batch.
    """

    itl_s: float
    mean: float
    step_s: float
    load: float
    seat: Wait = NO_WAIT


class Prefill:
    """Workers that only read prompts, in steps of `batched` tokens of the whole replica."""

    def __init__(self, profile: Profile, mix: Traffic, batched: int, routing: Routing) -> None:
        self.profile = profile
        self.mix = mix
        self.batched = batched
        self._routing = routing
        self._ranks = ranks_of(profile)
        budget = batched / self._ranks
        self._fixed = profile.prefill.seconds[0]
        self._parts = [(*self._part(prompt, budget), share) for prompt, share in mix.prompts]
        tokens = sum(new * share for _, new, _, share in self._parts)
        work = sum(seconds * share for seconds, _, _, share in self._parts)
        self._least = work + self._fixed * tokens / budget
        self._step = work / tokens * budget + self._fixed

    def _part(self, prompt: float, budget: float) -> tuple[float, float, int]:
        """(Seconds of reading, new tokens, steps) of a prompt."""
        new = fresh(prompt, self.mix.hit_rate)
        return self.profile.prefill_s(round(prompt - new), round(new)), new, math.ceil(new / budget)

    def load(self, rate: float, replicas: int) -> float:
        """Share of the time that the workers are busy."""
        return rate * self._least / (replicas * self._ranks)

    def alone_s(self) -> float:
        """The longest of the prompts' times on an idle worker."""
        return max(work + steps * self._fixed for work, _, steps, _ in self._parts)

    def reading(
        self, rate: float, replicas: int, after_s: float = 0.0, seat: Wait = NO_WAIT
    ) -> Reading | None:
        """What waits there; `after_s` and the wait for a `seat` come after the prefill. None when they cannot
        keep up.

        While others wait, a step's fixed cost is shared, and the step ends late by what it reads of those
        behind: half a step on average, or what waits if that is less.
        """
        servers = replicas * self._ranks
        load = self.load(rate, replicas)
        if load >= 1.0:
            return None
        budget = self.batched / self._ranks
        times = [
            (work + self._fixed * ((1.0 - load) * steps + load * new / budget), share)
            for work, new, steps, share in self._parts
        ]
        wait = waits(moments(times), servers, rate, self._routing)
        if wait is None:
            return None
        behind = load * min(self._step / 2.0, wait.shape * wait.scale_s)
        points = tuple(
            (work + steps * self._fixed + behind + after_s + self._moved_s(new, prompt), share)
            for (work, new, steps, share), (prompt, _) in zip(self._parts, self.mix.prompts, strict=True)
        )
        return Reading(wait, points, load, seat)

    def _moved_s(self, new: float, prompt: float) -> float:
        return 0.0


class Disaggregated(Prefill):
    """Workers that read prompts for others: the KV of the whole prompt moves before the first token."""

    def _moved_s(self, new: float, prompt: float) -> float:
        return self.profile.transfer_s(round(prompt))

    def link_load(self, rate: float, replicas: int) -> float:
        """Share of what a replica can send that its prompts' KV takes."""
        moved = sum(prompt * share for prompt, share in self.mix.prompts)
        transfer = self.profile.transfer
        return rate / replicas * moved * transfer.bytes_per_token / transfer.bytes_per_s


class Decode:
    """Workers that write answers. `seats`: sequences in a replica's batch with which the gap is within the
    ITL, 0 = not even one; `most`: those it has room for, by KV and limits.

    `reading_s`: seconds of prompts that the same worker has to read for each answer, 0 when others do.
    """

    def __init__(self, profile: Profile, mix: Traffic, itl_s: float | None, reading_s: float = 0.0) -> None:
        self.profile = profile
        self.mix = mix
        self._reading_s = reading_s
        limit = profile.limits.sequences if profile.limits else _MOST_SEQUENCES
        self.most = min(room(profile, mix), limit, _MOST_SEQUENCES)
        self.seats = self.most
        if itl_s is not None:
            self.seats = self._largest(itl_s)

    @cached_property
    def steps(self) -> list[float]:
        """steps[k]: seconds of a step with k in the batch; steps[0] is as of one."""
        context = self.mix.context
        return [self.profile.decode_s(max(1, count), context) for count in range(max(1, self.most) + 1)]

    def gap_s(self, count: int) -> float:
        """Time between tokens with `count` in the batch: its step, and what it reads of others' prompts.

        By Little's law there are as many arrivals as sequences in the batch while one answer is written.
        """
        return self.steps[count] + count * self._reading_s / max(1.0, self.mix.answer)

    def _largest(self, itl_s: float) -> int:
        """Most sequences with which the gap is within `itl_s`; the gap grows with them."""
        low, high = 0, self.most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.gap_s(middle) <= itl_s else (low, middle - 1)
        return low

    def limit(self, seats: int) -> None:
        """No more than that in a batch."""
        self.seats, self.most = min(self.seats, seats), min(self.most, seats)

    def talking(self, rate: float, replicas: int, share: float) -> Talking | None:
        """At that rate; None when `share` of the gaps would be longer than the ITL, or nothing keeps up."""
        pooled = min(replicas, max(1, _POOLED_SEATS // max(1, self.seats)))
        found = self._in_flight(rate / replicas, pooled, share)
        if found is None or found.at >= self.seats * pooled:
            return None
        crowded = min(self.seats, -(-(found.at + 1) // pooled))
        batch = found.mean / pooled
        mean = max(1, min(self.seats, round(batch)))
        seat = found.wait(rate * pooled / replicas)
        return Talking(self.gap_s(crowded), batch, self.steps[mean], batch / self.seats, seat)

    def allowed(self, rate: float, replicas: int) -> int:
        """Sequences that a replica is to be allowed at once: those within the ITL, and beyond these as many
        as chance brings to one in a thousand moments at most, should requests come to it at random. A batch
        above the ITL for a moment costs a request little, waiting until an answer ends much.
        """
        found = self._in_flight(rate / replicas, 1, _SEATED)
        return self.most if found is None else min(self.most, max(self.seats, found.at + 1))

    def _in_flight(self, each: float, pooled: int, share: float) -> InFlight | None:
        """Of so many replicas together, each with its part of the rate; None when they cannot keep up."""
        reading = each * self._reading_s
        if not self.seats or reading >= 1.0:
            return None
        steps, slower = self.steps, 1.0 / (1.0 - reading)
        offered = each * pooled * self.mix.answer
        return in_flight(
            offered, self.most * pooled, lambda count: steps[-(-count // pooled)] * slower, share
        )


class Aggregated:
    """Workers that do both: steps of `batched` tokens, those of answers first, prompts with what is left."""

    def __init__(
        self, profile: Profile, mix: Traffic, batched: int, itl_s: float | None, routing: Routing
    ) -> None:
        self._ranks = ranks_of(profile)
        parts = [(prompt, fresh(prompt, mix.hit_rate), share) for prompt, share in mix.prompts]
        self._parts = [
            (profile.prefill_s(round(p - new), round(new)) / self._ranks, new, share)
            for p, new, share in parts
        ]
        self._work = sum(work * share for work, _, share in self._parts)
        self._tokens = sum(new * share for _, new, share in self._parts)
        self.batched = batched
        self._routing = routing
        self._profile = profile
        self.decode = Decode(profile, mix, itl_s, self._work)
        self.decode.limit(batched // 2)

    def both(self, rate: float, replicas: int, share: float) -> tuple[Reading, Talking] | None:
        """Prompts and answers at that rate; None when the workers cannot keep up or lack seats.

        A prompt's step carries the answers' tokens too: while prompts wait, each step's share of those is
        part of what a prompt takes.
        """
        talking = self.decode.talking(rate, replicas, share)
        if talking is None:
            return None
        budget = self.batched - talking.mean
        step = talking.step_s
        times = [(work + step * new / budget, part) for work, new, part in self._parts]
        wait = waits(moments(times), replicas, rate, self._routing)
        if wait is None:
            return None
        load = rate / replicas * sum(time * part for time, part in times)
        full = self._work / self._tokens * budget + step
        behind = load * min(full / 2.0, wait.shape * wait.scale_s) + (1.0 - load) * step / 2.0
        points = tuple(
            (work * self._ranks + math.ceil(new / budget) * step + behind, part)
            for work, new, part in self._parts
        )
        return Reading(wait, points, load, talking.seat), talking


def ranks_of(profile: Profile) -> int:
    """Data-parallel ranks of a replica, each of which reads prompts of its own."""
    return profile.subject.layout.data if profile.subject else 1


def fresh(prompt: float, hit_rate: float) -> float:
    """Tokens of a prompt that are not found in the cache: at least the last one."""
    return max(1.0, prompt * (1.0 - hit_rate))


def moments(times: list[tuple[float, float]]) -> Service:
    """Of (seconds, share)."""
    first, second, third = (sum(time**power * share for time, share in times) for power in (1, 2, 3))
    return Service(first, second, third)


def room(profile: Profile, mix: Traffic) -> int:
    """Sequences whose KV a replica holds, with what they may hold above the average; 0 = not the longest.

    n with n * mean + z * sqrt(n) * deviation = tokens.
    """
    if profile.limits is None:
        return _MOST_SEQUENCES
    tokens = profile.limits.kv_tokens
    if mix.longest > tokens / ranks_of(profile):
        return 0
    above = _z(_KV_SHARE) * mix.context_deviation
    root = (-above + math.sqrt(above**2 + 4.0 * mix.context * tokens)) / (2.0 * mix.context)
    return max(1, int(root**2))


@lru_cache
def _z(share: float) -> float:
    return NormalDist().inv_cdf(share)
