"""How many replicas keep the service level at a demand, from what one replica costs. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.pools import Aggregated, Decode, Disaggregated
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.queueing import Routing
from dynctl.perfmodel.traffic import Traffic, traffic
from dynctl.protocol.instances import Role

_FULL = 0.95
"""How busy workers may be when nothing is asked of their times."""
_FIRST_STEPS = 1.5
"""After a prompt's KV has come: half of the step that runs, and its own."""
_POINTS = 16
_MOST_CV = 3.0
_BATCHED = 8192


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
        mix = traffic(forecast.demand())
        low, high = 0, max(1, most)
        if not self._fine(role, forecast.rate, mix, high):
            return high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fine(role, forecast.rate, mix, middle) else (middle, high)
        return high

    def _fine(self, role: Role, rate: float, mix: Traffic, replicas: int) -> bool:
        if rate <= 0.0:
            return True
        if role == "prefill":
            return self._reads(mix, rate, replicas)
        if role == "decode":
            return self._writes(mix, rate, replicas)
        return self._both(mix, rate, replicas)

    def _reads(self, mix: Traffic, rate: float, replicas: int) -> bool:
        profile = self.profiles["prefill"]
        reader = Disaggregated(profile, mix, batched_of(profile), self.routing)
        reading = reader.reading(rate, replicas, self._after_s(mix))
        if reading is None:
            return False
        idle = reader.reading(0.0, replicas, self._after_s(mix))
        if self._hopeless(idle.late if idle else None):
            return reading.load <= _FULL
        return reading.late(self.sla.ttft_s or 0.0) <= 1.0 - self.sla.percentile

    def _writes(self, mix: Traffic, rate: float, replicas: int) -> bool:
        writer = Decode(self.profiles["decode"], mix, self.sla.itl_s)
        if not writer.seats:  # not even one is in time: as many as the KV holds
            writer = Decode(self.profiles["decode"], mix, None)
        return not writer.seats or writer.talking(rate, replicas, self.sla.percentile) is not None

    def _both(self, mix: Traffic, rate: float, replicas: int) -> bool:
        profile = self.profiles["aggregated"]
        one = Aggregated(profile, mix, batched_of(profile), self.sla.itl_s, self.routing)
        if not one.decode.seats:
            one = Aggregated(profile, mix, batched_of(profile), None, self.routing)
        found = one.both(rate, replicas, self.sla.percentile)
        if found is None:
            return False
        reading, talking = found
        idle = one.both(1e-9, replicas, self.sla.percentile)
        if self._hopeless(idle[0].late if idle else None):
            return reading.load <= _FULL
        return reading.late(self.sla.ttft_s or 0.0) + talking.full <= 1.0 - self.sla.percentile

    def _hopeless(self, late: object) -> bool:
        """Whether nothing is asked of the first token, or too many are late with nobody before them."""
        if self.sla.ttft_s is None or not callable(late):
            return True
        return bool(late(self.sla.ttft_s) > 1.0 - self.sla.percentile)

    def _after_s(self, mix: Traffic) -> float:
        """From the arrival of a prompt's KV to its first token, at workers as full as they may be."""
        profile = self.profiles.get("decode")
        if profile is None:
            return 0.0
        writer = Decode(profile, mix, self.sla.itl_s)
        return _FIRST_STEPS * writer.steps[max(1, writer.seats)]


def batched_of(profile: Profile) -> int:
    """Prompt tokens that a step of a replica computes at most."""
    return profile.limits.batched_tokens if profile.limits else _BATCHED
