"""The words of a decision: what is asked of a service, what could be run, what came out. Values only.

Times in seconds, rates a second, lengths in tokens.
"""

from __future__ import annotations

from statistics import fmean
from typing import Literal

import msgspec

from dynctl.perfmodel.layout import Layout
from dynctl.protocol.instances import Role


class Sla(msgspec.Struct, frozen=True, kw_only=True):
    """What `percentile` (0..1) of the requests must get; None = not asked for."""

    ttft_s: float | None = None
    itl_s: float | None = None
    percentile: float = 0.95


class Demand(msgspec.Struct, frozen=True, kw_only=True):
    """Requests that come as a Poisson process. `lengths`: a sample of (prompt, answer), at least one.
    `rate`: 0 in a choice for the highest rate, where none keeps the SLA.

    `hit_rate`: share of prompt tokens found in a worker's cache.
    """

    rate: float
    lengths: tuple[tuple[int, int], ...]
    hit_rate: float = 0.0

    @property
    def isl(self) -> float:
        """Prompt tokens, mean."""
        return fmean(prompt for prompt, _ in self.lengths)

    @property
    def osl(self) -> float:
        """Answer tokens, mean."""
        return fmean(answer for _, answer in self.lengths)

    def scaled(self, *, rate: float = 1.0, isl: float = 1.0, osl: float = 1.0) -> Demand:
        """The same with each of these times so much."""
        lengths = tuple((max(1, round(p * isl)), max(1, round(a * osl))) for p, a in self.lengths)
        return Demand(rate=self.rate * rate, lengths=lengths, hit_rate=self.hit_rate)


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """The workers of one role. `sequences`, `batched_tokens`: batch limits to be set.

    `load`: share of what the pool can do that the demand takes.
    """

    role: Role
    layout: Layout
    replicas: int
    sequences: int
    batched_tokens: int
    load: float

    @property
    def gpus(self) -> int:
        """Of all its replicas."""
        return self.layout.gpus * self.replicas


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What users get and what it costs: `ttft_s` and `itl_s` at the SLA's percentile, the most requests a
    second within the SLA, and answer tokens a second by GPU at the demand, and of one user's stream.
    """

    ttft_s: float
    itl_s: float
    capacity: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run the service. `misses`: what of the SLA it does not keep, in words."""

    mode: Literal["aggregated", "disaggregated"]
    pools: tuple[Pool, ...]
    predicted: Prediction
    misses: tuple[str, ...] = ()

    @property
    def gpus(self) -> int:
        """Of all its pools."""
        return sum(pool.gpus for pool in self.pools)

    def pool(self, role: Role) -> Pool | None:
        """The pool of a role."""
        return next((pool for pool in self.pools if pool.role == role), None)

    @property
    def label(self) -> str:
        """As people write it: 2 x TP4 prefill + 1 x TP8 decode."""
        return " + ".join(f"{pool.replicas} x {pool.layout.label} {pool.role}" for pool in self.pools)


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A layout that cannot be, and why."""

    layout: Layout
    reason: str
    role: Role | Literal[""] = ""


class Variation(msgspec.Struct, frozen=True, kw_only=True):
    """What would be chosen if the demand were another: `what` (isl, osl, rate) times `factor`. `option` None:
    nothing would keep the SLA. `holds`: whether what is chosen now would still keep it.
    """

    what: Literal["isl", "osl", "rate"]
    factor: float
    option: Option | None
    holds: bool


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """The decision. `chosen` None: nothing keeps the SLA, `why` tells what is nearest and what it would take.

    `options`: the best ones, best first, `chosen` among them; the best of each mode is always there.
    """

    sla: Sla
    demand: Demand
    chosen: Option | None
    options: tuple[Option, ...] = ()
    refused: tuple[Refused, ...] = ()
    sensitivity: tuple[Variation, ...] = ()
    why: str = ""

    def rank(self, option: Option) -> Literal["chosen", "runner-up", "best aggregated", ""]:
        """What an option of this choice is, in words; "" when nothing much, or nothing was chosen."""
        if self.chosen is None:
            return ""
        if option == self.chosen:
            return "chosen"
        others = [one for one in self.options if one != self.chosen]
        if others and option == others[0]:
            return "runner-up"
        together = [one for one in self.options if one.mode == "aggregated"]
        return "best aggregated" if together and option == together[0] else ""
