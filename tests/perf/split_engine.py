"""A service step by step, as a discrete-event simulation: the truth for predictions.

Steps are those of the simulated engine's scheduler (`dynctl.mocker.scheduler`): one token for each sequence
in the batch, then prompts in their order with what is left of the budget. No blocks and no cache: what is
asked is time. Steps that only write answers go in runs, until something ends or comes.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynctl.perfmodel.choice import Demand, Option, Pool
from dynctl.perfmodel.profile import Profile


@dataclass(slots=True)
class Asked:
    """One request; `first_s`, `end_s`: when its first and last token came."""

    at_s: float
    prompt: int
    answer: int
    first_s: float = 0.0
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.at_s

    @property
    def itl_s(self) -> float:
        return (self.end_s - self.first_s) / max(1, self.answer - 1)


@dataclass(slots=True)
class Part:
    """A prompt of which `done` tokens are read and `left` are not."""

    asked: Asked
    done: int
    left: int


@dataclass(slots=True)
class Clock:
    """What happens next."""

    now_s: float = 0.0
    events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    order: itertools.count[int] = field(default_factory=itertools.count)

    def after(self, delay_s: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now_s + delay_s, next(self.order), what))

    def run(self) -> None:
        while self.events:
            self.now_s, _, what = heapq.heappop(self.events)
            what()


_RUN = 32


class Engine:
    """One worker. `read` is called for what has been read when it does not write answers itself."""

    def __init__(
        self, clock: Clock, profile: Profile, pool: Pool, read: Callable[[Asked], None] | None = None
    ) -> None:
        self.clock, self.profile, self.read = clock, profile, read
        self.sequences, self.budget = pool.sequences, pool.batched_tokens
        self.kv_tokens = profile.limits.kv_tokens if profile.limits else 1 << 60
        self.waiting: deque[Part] = deque()
        self.reading: deque[Part] = deque()
        self.ends: list[tuple[int, int, Asked]] = []
        self.queued = self.context = self.step = self.held = 0
        self.busy = False
        self.order = itertools.count()
        self.run: tuple[float, float, int] | None = None
        self.runs = 0

    def add(self, asked: Asked, cached: int) -> None:
        """A request of which `cached` prompt tokens are there already."""
        self.queued += asked.prompt - cached
        self.held += asked.prompt
        self.waiting.append(Part(asked, cached, asked.prompt - cached))
        if not self.busy:
            self.begin()
        elif self.run:
            start, step_s, count = self.run
            passed = int((self.clock.now_s - start) / step_s) + 1
            if passed < count:
                self.plan_run(start, step_s, passed)

    def plan_run(self, start_s: float, step_s: float, count: int) -> None:
        """That many steps from `start_s` on; what was planned before does not count any more."""
        self.run, self.runs = (start_s, step_s, count), self.runs + 1
        number = self.runs
        self.clock.after(start_s + count * step_s - self.clock.now_s, lambda: self.end_run(number))

    def end_run(self, number: int) -> None:
        if number != self.runs or self.run is None:
            return
        more = self.run[2] - 1
        self.run = None
        self.step += more
        self.context += more * len(self.ends)
        self.end(())

    def begin(self) -> None:
        if self.ends and not self.waiting and not self.reading:
            batch = len(self.ends)
            count = min(_RUN, self.ends[0][0] - self.step)
            self.busy = True
            middle = self.context / batch + (count - 1) / 2
            self.plan_run(self.clock.now_s, self.profile.step_s(0.0, batch, middle), count)
            return
        batch, context = len(self.ends), self.context
        done: list[Asked] = []
        budget, work, joined = self.budget - batch, 0.0, 0
        while budget > 0:
            if not self.reading:
                full = batch + len(done) >= self.sequences or self.context >= self.kv_tokens
                if not self.waiting or full:
                    break
                self.reading.append(self.waiting.popleft())
            part = self.reading[0]
            count = min(part.left, budget)
            if part.left == 1:
                joined += 1
                context += part.asked.prompt
            else:
                work += self.profile.prefill_s(part.done, count)
            part.left -= count
            part.done += count
            budget -= count
            self.queued -= count
            if not part.left:
                done.append(self.reading.popleft().asked)
        if batch or done or work:
            self.busy = True
            batch += joined
            self.clock.after(
                self.profile.step_s(work, batch, context / max(1, batch)), lambda: self.end(done)
            )
        else:
            self.busy = False

    def end(self, done: Sequence[Asked]) -> None:
        now, self.step = self.clock.now_s, self.step + 1
        self.context += len(self.ends)
        while self.ends and self.ends[0][0] <= self.step:
            asked = heapq.heappop(self.ends)[2]
            asked.end_s = now
            self.context -= asked.prompt + asked.answer
            self.held -= asked.prompt
        for asked in done:
            if self.read:
                self.held -= asked.prompt
                self.read(asked)
                continue
            asked.first_s = asked.end_s = now
            if asked.answer > 1:
                heapq.heappush(self.ends, (self.step + asked.answer - 1, next(self.order), asked))
                self.context += asked.prompt + 1
            else:
                self.held -= asked.prompt
        self.begin()


def simulate(
    option: Option, profiles: dict[str, Profile], demand: Demand, requests: int, seed: int
) -> list[Asked]:
    """Requests that came as a Poisson process, the first tenth left out. `profiles`: by role."""
    clock, rng = Clock(), random.Random(seed)
    decodes: list[Engine] = []

    def hand_over(asked: Asked) -> None:
        delay = profiles["prefill"].transfer_s(asked.prompt)
        clock.after(delay, lambda: least(decodes, lambda one: one.held).add(asked, asked.prompt - 1))

    firsts = []
    for pool in option.pools:
        profile = profiles[pool.role]
        read = hand_over if pool.role == "prefill" else None
        engines = [Engine(clock, profile, pool, read) for _ in range(pool.replicas)]
        if pool.role == "decode":
            decodes = engines
        else:
            firsts = engines
    made: list[Asked] = []
    at = 0.0
    for _ in range(requests):
        at += rng.expovariate(demand.rate)
        made.append(Asked(at, *rng.choice(demand.lengths)))

    def arrive(asked: Asked) -> None:
        cached = min(asked.prompt - 1, round(asked.prompt * demand.hit_rate))
        least(firsts, lambda one: 30 * one.queued + one.held).add(asked, cached)

    for asked in made:
        clock.after(asked.at_s, lambda asked=asked: arrive(asked))  # type: ignore[misc]
    clock.run()
    return made[requests // 10 :]


def least(engines: Sequence[Engine], cost: Callable[[Engine], float]) -> Engine:
    """The one that costs least, the first of equals."""
    return min(engines, key=cost)


def at_share(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
