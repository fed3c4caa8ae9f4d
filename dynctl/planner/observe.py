"""What the planner sees: demand as it arrived, and how the workers of each role are doing. Values only.

Times in seconds, lengths in tokens. What nobody could measure is None.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dynctl.protocol.instances import Role


class WorkerLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One ready replica now, all its ranks together.

    `prefill_tokens`: prompt tokens given to it that it has still to read. `running`, `waiting`: requests in
    its engine's batch, and before it. `kv_usage`: share of its KV blocks in use, 0 to 1.
    """

    id: str
    prefill_tokens: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float | None = None


class RoleLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The replicas of one role. `wanted`: as many as there are to be, by whoever asked for them.

    `starting`: on their way to their first request; `draining`: on their way out, their GPUs not free yet.
    `failed`: given up before they ever served.
    """

    wanted: int
    ready: int
    starting: int = 0
    draining: int = 0
    failed: int = 0
    workers: tuple[WorkerLoad, ...] = ()


class Observation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The last `span_s` seconds of a deployment, and how it is at their end.

    `arrivals`: requests that came, whatever became of them: what saturation cannot hide. `isl`, `osl`: mean
    lengths of prompts and answers; `isl_cv`: how prompts spread, standard deviation by mean. `hit_rate`:
    share of prompt tokens found in caches. `queued`: requests that no worker has been given yet.
    `ttft_s`, `itl_s`: what users got at the service level's percentile; ITL as in the service level: each
    answer's mean time between its tokens, of answers that have ended. `ttft_mean_s`: on average;
    `itl_mean_s`: of all gaps between tokens. `kv_tokens`: tokens whose KV one replica holds, 0 = not known.
    """

    span_s: float
    arrivals: int
    roles: Mapping[Role, RoleLoad]
    isl: float | None = None
    isl_cv: float | None = None
    osl: float | None = None
    hit_rate: float | None = None
    queued: int = 0
    ttft_s: float | None = None
    itl_s: float | None = None
    ttft_mean_s: float | None = None
    itl_mean_s: float | None = None
    kv_tokens: int = 0
