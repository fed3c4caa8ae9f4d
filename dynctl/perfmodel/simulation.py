"""What is to be simulated, and what came out: the words between `dynctl simulate` and its process.

Times in seconds of the trace, lengths in tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import Limits, Profile
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import BusySpec, RouterSpec

MOST = 64
"""Replicas of a role, where nothing else bounds them."""
HANDOVER_S = 1.5
"""From the last request of a worker until it serves in its other role. Measured with idle simulated engines
on two cores, four times each way: 1.40 to 1.53 s from prefill to decode, 0.72 to 0.80 s back. It waits until
nothing has moved for 1 s (prefill) or 0.3 s (`worker/service`), and its sidecar starts anew.
"""


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The replicas of one role: how many at the start, GPUs of each, what each costs in time and takes at
    once, and how few and how many there may be.
    """

    role: Role
    replicas: int
    gpus: int
    profile: Profile
    limits: Limits
    least: int = 1
    most: int = MOST


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment as the simulator knows it. `boot_s`: from the start of a replica until it serves.

    `handover_s`: from the last request of a prefill worker until it serves as a decode worker, and back: for
    groups of the same GPUs and limits; None = its engine ends, and another boots.
    """

    name: str
    groups: tuple[Group, ...]
    router: RouterSpec = RouterSpec()
    busy: BusySpec = BusySpec()
    sla: Sla = Sla()
    boot_s: float = 60.0
    handover_s: float | None = None


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. `trace`: a file. `speed`: the trace in 1/speed of its time; `rate_scale`: so many times
    its requests. `planner`: a `planner.config.PlannerConfig` as plain values, None = the numbers stay as they
    are. `compare`: also fixed numbers, the classic formula, the oracle. `every_step`: no jumps, for tests.
    """

    service: Service
    trace: str
    seed: int = 1
    speed: float = 1.0
    rate_scale: float = 1.0
    planner: dict[str, Any] | None = None
    compare: bool = False
    every_step: bool = False


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of a time, over requests; None where no request has it."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """From `at_s` on so many replicas of each role are paid for, and so many of them serve."""

    at_s: float
    there: dict[Role, int]
    ready: dict[Role, int]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """One run. `ttft_met`, `itl_met`, `met` (both): shares of all requests, refused ones among them.

    ITL is a request's mean time between its tokens; a request of one token has none and keeps it. `goodput`:
    requests a second that keep both. GPU-hours count each replica from its start, boot included, to its end.
    `refused` by the frontend's queue; `aborted` after their beginning.
    """

    policy: str
    requests: int
    done: int
    refused: int
    aborted: int
    prompt_tokens: int
    answer_tokens: int
    hit_rate: float
    span_s: float
    ttft_met: float
    itl_met: float
    met: float
    goodput: float
    ttft_s: Quantiles
    itl_s: Quantiles
    gpu_hours: float
    preemptions: int = 0
    presence: tuple[Presence, ...] = ()
    reasons: tuple[str, ...] = ()

    def keeps(self, sla: Sla) -> bool:
        """Whether enough requests kept the SLA."""
        return self.met >= sla.percentile


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """How far a run is: the share of its requests that have ended."""

    policy: str
    share: float


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """A run has ended. `took_s` is real time."""

    result: Result
    took_s: float


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """It cannot be simulated."""

    kind: str
    message: str
    where: str = ""
    hint: str = ""


Told = Progress | Finished | Failed
"""A line of what the process prints."""

Policy = Literal["static", "planner", "peak", "mean", "classic", "oracle"]
