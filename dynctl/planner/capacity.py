"""How many replicas keep the service level at a demand, from what one replica costs. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.pools import Aggregated, Decode, Disaggregated, Reading
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.queueing import Routing
from dynctl.perfmodel.traffic import Traffic, traffic
from dynctl.protocol.instances import Role

_FULL = 0.95
"""How busy workers may be when nothing is asked of their times."""
FIRST_STEPS = 1.5
"""After a prompt's KV has come: half of the step that runs, and its own."""
_POINTS = 16
_MOST_CV = 3.0
_BATCHED = 8192
_IDLE = 1e-9
"""A rate at which nobody meets anybody."""
Fine = Callable[[float, int], bool]
"""(Arrivals a second, replicas) → whether the service level is kept."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Demand that is planned for. `isl_cv`: how prompts spread, standard deviation by mean."""

    rate: float
    isl: float
    osl: float
    hit_rate: float = 0.0
    isl_cv: float = 0.0

    def demand(self) -> Demand:
        """As the models of pools take it: prompts are log-normal, which two moments settle."""
        spread = min(_MOST_CV, max(0.0, self.isl_cv))
        answer = max(1, round(self.osl))
        if spread < 0.05:
            lengths: tuple[tuple[int, int], ...] = ((max(1, round(self.isl)), answer),)
        else:
            sigma = math.sqrt(math.log(1.0 + spread * spread))
            normal = NormalDist(-sigma * sigma / 2.0, sigma)
            raw = [math.exp(normal.inv_cdf((i + 0.5) / _POINTS)) for i in range(_POINTS)]
            scale = self.isl * _POINTS / sum(raw)
            lengths = tuple((max(1, round(one * scale)), answer) for one in raw)
        return Demand(rate=self.rate, lengths=lengths, hit_rate=min(0.99, max(0.0, self.hit_rate)))


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of the replicas: of the role itself, and of decode where answers are written apart."""

    sla: Sla
    routing: Routing
    profiles: dict[Role, Profile]

    def replicas(self, role: Role, forecast: Forecast, most: int) -> int:
        """The fewest, 1 to `most`, that keep the service level; `most` when not even those do.

        A time that one request on an idle worker misses already cannot be kept by any number: then they are
        to be no busier than `_FULL`.
        """
        if forecast.rate <= 0.0:
            return 1
        mix = traffic(forecast.demand())
        fine = {"prefill": self._reading, "decode": self._writing}.get(role, self._both)(mix)
        low, high = 0, max(1, most)
        if not fine(forecast.rate, high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fine(forecast.rate, middle) else (middle, high)
        return high

    def seats(self, role: Role, forecast: Forecast) -> int:
        """Requests that a replica which writes answers may have at once, within the ITL and its limits; where
        not even one is in time, within its limits.
        """
        return self._writer(role, forecast).seats

    def most_rate(self, role: Role, forecast: Forecast) -> float:
        """Requests a second that a replica can do at all, however long they wait."""
        work_s = 0.0
        if role != "decode":
            fresh = forecast.isl * (1.0 - forecast.hit_rate)
            work_s += self.profiles[role].prefill_s(0, max(1, round(fresh)))
        if role != "prefill":
            writer = self._writer(role, forecast)
            work_s += forecast.osl * writer.steps[writer.seats] / max(1, writer.seats)
        return 1.0 / max(1e-9, work_s)

    def _writer(self, role: Role, forecast: Forecast) -> Decode:
        mix, profile = traffic(forecast.demand()), self.profiles[role]

        def within(itl_s: float | None) -> Decode:
            if role == "decode":
                return Decode(profile, mix, itl_s)
            return Aggregated(profile, mix, batched_of(profile), itl_s, self.routing).decode

        found = within(self.sla.itl_s)
        return found if found.seats else within(None)

    def _reading(self, mix: Traffic) -> Fine:
        profile = self.profiles["prefill"]
        reader = Disaggregated(profile, mix, batched_of(profile), self.routing)
        after_s = self._after_s(mix)
        hopeless = self._hopeless(reader.reading(_IDLE, 1, after_s))

        def fine(rate: float, replicas: int) -> bool:
            reading = reader.reading(rate, replicas, after_s)
            return reading is not None and self._in_time(reading, hopeless=hopeless)

        return fine

    def _writing(self, mix: Traffic) -> Fine:
        writer = Decode(self.profiles["decode"], mix, self.sla.itl_s)
        if not writer.seats:  # not even one is in time: as many as the KV holds
            writer = Decode(self.profiles["decode"], mix, None)

        def fine(rate: float, replicas: int) -> bool:
            return not writer.seats or writer.talking(rate, replicas, self.sla.percentile) is not None

        return fine

    def _both(self, mix: Traffic) -> Fine:
        profile = self.profiles["aggregated"]
        one = Aggregated(profile, mix, batched_of(profile), self.sla.itl_s, self.routing)
        if not one.decode.seats:
            one = Aggregated(profile, mix, batched_of(profile), None, self.routing)
        idle = one.both(_IDLE, 1, self.sla.percentile)
        hopeless = self._hopeless(idle[0] if idle else None)

        def fine(rate: float, replicas: int) -> bool:
            found = one.both(rate, replicas, self.sla.percentile)
            return found is not None and self._in_time(found[0], hopeless=hopeless)

        return fine

    def _in_time(self, reading: Reading, *, hopeless: bool) -> bool:
        """Whether enough first tokens come in time."""
        if hopeless or self.sla.ttft_s is None:
            return reading.load <= _FULL
        return reading.late(self.sla.ttft_s) <= 1.0 - self.sla.percentile

    def _hopeless(self, idle: Reading | None) -> bool:
        """Whether too many first tokens are late with nobody before them."""
        if idle is None or self.sla.ttft_s is None:
            return True
        return idle.late(self.sla.ttft_s) > 1.0 - self.sla.percentile

    def _after_s(self, mix: Traffic) -> float:
        """From the arrival of a prompt's KV to its first token, at workers as full as they may be."""
        profile = self.profiles.get("decode")
        if profile is None:
            return 0.0
        writer = Decode(profile, mix, self.sla.itl_s)
        return FIRST_STEPS * profile.decode_s(max(1, writer.seats), mix.context)


def batched_of(profile: Profile) -> int:
    """Prompt tokens that a step of a replica computes at most."""
    return profile.limits.batched_tokens if profile.limits else _BATCHED
