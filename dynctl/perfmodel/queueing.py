"""How long work waits: quantiles of waits at servers with random arrivals, and how many are in flight. Pure.

Arrivals are Poisson. Waits at c servers (M/G/c, first come first served, which is what routing to the least
work amounts to): whoever waits at all (Erlang's C) waits like in a queue with one server c times as fast, by
Pollaczek and Khinchine a geometric number of residual service times; a gamma distribution with the first two
moments of that sum stands for it (Tijms, A First Course in Stochastic Models, 9.6). What is decoded shares a
worker: its states have a product form that depends on the mean answer alone (Kelly, Reversibility and
Stochastic Networks, chapter 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Routing = Literal["least_work", "round_robin", "random"]
"""Which worker a request goes to: the one with the least to do, each in turn, any."""

_STEPS = 500
_SMALL = 1e-12
_HUGE = 1e250


def erlang_b(servers: int, offered: float) -> float:
    """Share of arrivals that find all servers busy when none may wait; `offered`: rate times mean time."""
    blocked = 1.0
    for count in range(1, servers + 1):
        blocked = offered * blocked / (count + offered * blocked)
    return blocked


def erlang_c(servers: int, load: float) -> float:
    """Share of arrivals that must wait for one of the servers, each busy for `load` (0..1) of the time."""
    blocked = erlang_b(servers, load * servers)
    return blocked / (1.0 - load * (1.0 - blocked))


def gamma_tail(shape: float, x: float) -> float:
    """P(X > x) for a gamma distribution with scale 1: the regularised upper incomplete gamma function.

    Power series below the mean, Lentz's continued fraction above it (Abramowitz and Stegun 6.5.29, 6.5.31).
    """
    if x <= 0.0:
        return 1.0
    front = math.exp(shape * math.log(x) - x - math.lgamma(shape))
    if x < shape + 1.0:
        term = total = 1.0 / shape
        for step in range(1, _STEPS):
            term *= x / (shape + step)
            total += term
            if term < total * _SMALL:
                break
        return max(0.0, 1.0 - front * total)
    low = x + 1.0 - shape
    c, d = 1.0 / 1e-300, 1.0 / low
    fraction = d
    for step in range(1, _STEPS):
        top = -step * (step - shape)
        low += 2.0
        d = 1.0 / (top * d + low)
        c = low + top / c
        fraction *= c * d
        if abs(c * d - 1.0) < _SMALL:
            break
    return front * fraction


@dataclass(frozen=True, slots=True)
class Service:
    """The times a server takes, by their moments: E[S], E[S²], E[S³]."""

    mean: float
    second: float
    third: float

    @property
    def k2(self) -> float:
        """Squared coefficient of variation."""
        return max(0.0, self.second / self.mean**2 - 1.0)


def service(times_s: Sequence[float]) -> Service:
    """The moments of a sample of times, each as likely; at least one, all above 0."""
    count = len(times_s)
    powers = [sum(time**power for time in times_s) / count for power in (1, 2, 3)]
    return Service(*powers)


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait that is 0 but for a share `delayed`, which waits a gamma-distributed time."""

    delayed: float
    shape: float
    scale_s: float

    def tail(self, time_s: float) -> float:
        """P(wait > time_s)."""
        if time_s < 0.0:
            return 1.0
        return self.delayed * gamma_tail(self.shape, time_s / self.scale_s)

    def quantile(self, share: float) -> float:
        """The time in which `share` (0..1, below 1) of the arrivals have been taken."""
        if self.delayed <= 1.0 - share:
            return 0.0
        return crossing(self.tail, 1.0 - share, self.scale_s)


def waits(times: Service, servers: int, rate: float, routing: Routing = "least_work") -> Wait | None:
    """The wait of arrivals, `rate` a second, at `servers` servers; None when they cannot keep up.

    Each in turn: arrivals at one server are Erlang-distributed apart, with 1/servers of the variance; the
    wait is scaled as the mean of Krämer and Langenbach-Belz says, and theirs is the share that waits.
    """
    load = rate * times.mean / servers
    if load >= 1.0:
        return None
    if load <= 0.0:
        return Wait(0.0, 1.0, 1.0)
    pooled = servers if routing == "least_work" else 1
    residual = times.second / (2.0 * times.mean) / pooled
    residual_second = times.third / (3.0 * times.mean) / pooled**2
    spread = residual_second * (1.0 - load) / residual**2 + 2.0 * load - 1.0
    mean = residual / (1.0 - load)
    delayed = load
    if routing == "least_work":
        delayed = erlang_c(servers, load)
        mean *= _few_lengths(servers, load, times.k2)
    elif routing == "round_robin" and servers > 1:
        regular, k2 = 1.0 / servers, times.k2
        mean *= (regular + k2) / (1.0 + k2)
        below = (1.0 + regular + load * k2) / (1.0 + load * (k2 - 1.0) + load**2 * (4.0 * regular + k2))
        delayed = load + (regular - 1.0) * load * (1.0 - load) * below
    return Wait(max(0.0, delayed), 1.0 / spread, mean * spread)


def _few_lengths(servers: int, load: float, k2: float) -> float:
    """How much longer those wait whose service times are all alike than a faster server says (Cosmetatos)."""
    if k2 >= 1.0:
        return 1.0
    more = (1.0 - load) * (servers - 1) * (math.sqrt(4.0 + 5.0 * servers) - 2.0) / (16.0 * load * servers)
    return 1.0 + (1.0 - k2) / (1.0 + k2) * min(more, 1.0)


def crossing(tail: Callable[[float], float], share: float, step: float) -> float:
    """Where a falling function comes down to `share`, to one part in a thousand; `step`: about its scale."""
    high = step
    while tail(high) > share:
        high *= 2.0
    low = 0.0 if high == step else high / 2.0
    while high - low > 1e-3 * high and high > 1e-9:
        middle = (low + high) / 2.0
        low, high = (middle, high) if tail(middle) > share else (low, middle)
    return high


NO_WAIT = Wait(0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True)
class InFlight:
    """How many are being worked on at once: `mean`; `at` that many or fewer for the share asked for.

    `full`: share of the arrivals that find no place; `load`: arrivals by what all places together can do.
    """

    mean: float
    at: int
    full: float
    load: float

    def wait(self, rate: float) -> Wait:
        """For a place, of arrivals that come `rate` a second: whoever finds none waits as at that many
        servers (M/M/c), exponentially.
        """
        return Wait(self.full, 1.0, self.load / ((1.0 - self.load) * rate)) if self.full else NO_WAIT


def in_flight(offered: float, most: int, step_s: Callable[[int], float], share: float) -> InFlight | None:
    """What is in flight at workers that take what comes, up to `most` at once; more waits its turn.

    `offered`: arrivals a second times tokens of each. step_s(k), k from 1 to `most`: seconds in which each of
    k in flight gets its next token. States k have weight prod offered * step_s(j) / j. The gaps between
    tokens are seen by arrivals: k - 1 others with those weights. None when they cannot keep up.
    """
    load = offered * step_s(most) / most
    if load >= 1.0:
        return None
    weights = [1.0]
    weight = total = 1.0
    for count in range(1, most + 1):
        growth = offered * step_s(count) / count
        weight *= growth
        if weight > _HUGE:
            weights = [one / weight for one in weights]
            total, weight = total / weight, 1.0
        weights.append(weight)
        total += weight
        if growth < 1.0 and weight < total * _SMALL:
            break  # so many are never there, and more even less
    last = weight if len(weights) == most + 1 else 0.0
    beyond = last * load / (1.0 - load)
    total += beyond
    mean = sum(count * one for count, one in enumerate(weights)) + beyond * (most + 1.0 / (1.0 - load))
    reached, at = 0.0, most + 1
    for count, one in enumerate(weights):
        reached += one
        if reached >= share * total:
            at = count
            break
    return InFlight(mean / total, at, (last + beyond) / total, load)
