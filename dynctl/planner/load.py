"""How pressed the workers of a role are right now, and how many fewer would do. Pure.

Each worker's own time to first token and time between tokens are estimated from what waits there and from
what a replica costs (the load mode of NVIDIA Dynamo's planner does so from forward passes); what is not known
is judged by what users got.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import Profile
from dynctl.planner.capacity import Costs, Forecast
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role

_SAFE = 0.8
"""Of the service level, with fewer workers: so much of it may be used up."""
_FAR = 0.5
"""The same where it is only known what users got."""
_TWICE = 2.0
_BUSY = 0.8
_KV_FULL = 0.95
_KV_SAFE = 0.85


@dataclass(frozen=True, slots=True)
class Pressure:
    """`over`: every worker is beyond the service level, `why` in words. `fewest`: so many would do. `far`:
    users got twice the service level, or worse.
    """

    over: bool
    why: str
    fewest: int
    far: bool = False


@dataclass(frozen=True, slots=True)
class _Sight:
    role: Role
    load: RoleLoad
    seen: Observation
    profile: Profile | None
    sla: Sla
    usual: Forecast | None

    @property
    def reads(self) -> bool:
        return self.role != "decode"

    @property
    def writes(self) -> bool:
        return self.role != "prefill"

    @property
    def workers(self) -> int:
        return max(1, self.load.ready)

    @property
    def fresh(self) -> float:
        """Prompt tokens of one request that are to be computed."""
        return self.usual.isl * (1.0 - self.usual.hit_rate) if self.usual else 0.0

    @property
    def own_s(self) -> float:
        """Time to first token of a request that finds nobody before it."""
        if self.profile is None or not self.fresh:
            return 0.0
        return self.profile.prefill.seconds[0] + self.profile.prefill_s(0, round(self.fresh))

    def queue_s(self, worker: WorkerLoad, times: float = 1.0) -> float:
        """What is before a new request at a worker: tokens given to it, its part of those given to none."""
        assert self.profile is not None
        tokens = worker.prefill_tokens + self.seen.queued * self.fresh / self.workers
        return self.profile.prefill_s(0, round(tokens * times))

    def gap_s(self, worker: WorkerLoad, times: float = 1.0) -> float:
        """Time between tokens at a worker with one request more."""
        if self.profile is None or self.usual is None:
            return 0.0
        count = round((worker.running + worker.waiting) * times) + 1
        return self.profile.decode_s(count, self.usual.isl + self.usual.osl / 2)

    @property
    def ttft_s(self) -> float | None:
        """What can be asked of the first token: twice its own time where that is too long already."""
        wanted = self.sla.ttft_s
        return None if wanted is None else wanted if self.own_s < wanted else 2.0 * self.own_s


def pressure(
    role: Role, seen: Observation, profile: Profile | None, sla: Sla, usual: Forecast | None
) -> Pressure:
    """Of one role now. `usual`: lengths of requests and their rate, None when not known yet."""
    sight = _Sight(role, seen.roles[role], seen, profile, sla, usual)
    over = _all_late(sight) or _all_slow(sight) or _all_full(sight) or _users_wait(sight)
    fewest = sight.load.ready
    while not over and fewest > 1 and _safe(sight, fewest - 1):
        fewest -= 1
    return Pressure(bool(over), over, max(1, fewest), _far(sight))


def backlog(role: Role, seen: Observation, costs: Costs, usual: Forecast) -> float:
    """Requests beyond what the workers of a role are to have: prompts that wait, answers without a seat."""
    workers, beyond = seen.roles[role].workers, 0.0
    if role != "prefill":
        beyond = sum(w.running + w.waiting for w in workers) - len(workers) * costs.seats(role, usual)
    if role != "decode":
        fresh = max(1.0, usual.isl * (1.0 - usual.hit_rate))
        beyond = max(beyond, seen.queued + sum(w.prefill_tokens for w in workers) / fresh)
    return max(0.0, beyond)


def _all_late(sight: _Sight) -> str:
    limit, workers = sight.ttft_s, sight.load.workers
    if not sight.reads or limit is None or sight.profile is None or not workers or not sight.fresh:
        return ""
    soonest = min(sight.queue_s(worker) for worker in workers) + sight.own_s
    return f"every worker would take {_ms(soonest)} to the first token, {_ms(limit)} are asked for" * (
        soonest > limit
    )


def _all_slow(sight: _Sight) -> str:
    limit, workers = sight.sla.itl_s, sight.load.workers
    if not sight.writes or limit is None or sight.profile is None or not workers:
        return ""
    fastest = min(sight.gap_s(worker) for worker in workers)
    alone = sight.gap_s(WorkerLoad(id=""))
    return f"every worker would take {_ms(fastest)} between tokens, {_ms(limit)} are asked for" * (
        fastest > limit and alone <= limit
    )


def _all_full(sight: _Sight) -> str:
    workers = sight.load.workers
    if not sight.writes or not workers:
        return ""
    full = all(w.kv_usage is not None and w.kv_usage > _KV_FULL and w.waiting > 0 for w in workers)
    return "the KV cache of every worker is full, and requests wait" * full


def _users_wait(sight: _Sight) -> str:
    """What users got, where there is somebody to blame it on: requests that wait at every worker."""
    seen, sla, workers = sight.seen, sight.sla, sight.load.workers
    waits = bool(workers) and all(w.waiting > 0 or w.prefill_tokens > 0 for w in workers)
    asked_for = f"{{}} are asked for at p{sla.percentile * 100:g}"
    late = sight.reads and sla.ttft_s is not None and (waits or seen.queued)
    if late and sla.ttft_s is not None and (seen.ttft_s or 0.0) > max(sla.ttft_s, sight.ttft_s or 0.0):
        return f"first tokens came after {_ms(seen.ttft_s or 0.0)}, {asked_for.format(_ms(sla.ttft_s))}"
    # Where prompts are read in between, gaps are longer than the profile's, most of all in short answers.
    blind = sight.profile is None or sight.usual is None or sight.reads
    if sight.writes and blind and sla.itl_s is not None and (seen.itl_s or 0.0) > sla.itl_s:
        return f"tokens came {_ms(seen.itl_s or 0.0)} apart, {asked_for.format(_ms(sla.itl_s))}"
    if sight.reads and sla.ttft_s is None and seen.queued:
        return f"{seen.queued} requests wait for a worker"
    return ""


def _far(sight: _Sight) -> bool:
    ttft = sight.reads and sight.sla.ttft_s and (sight.seen.ttft_s or 0.0) > _TWICE * sight.sla.ttft_s
    itl = sight.writes and sight.sla.itl_s and (sight.seen.itl_s or 0.0) > _TWICE * sight.sla.itl_s
    return bool(ttft or itl)


def _safe(sight: _Sight, fewer: int) -> bool:
    """Whether so many workers would do with what these have: no queue, times and KV within bounds."""
    times = sight.load.ready / fewer
    workers = sight.load.workers
    if sight.seen.queued or len(workers) < sight.load.ready:
        return False  # nobody knows what those do that say nothing
    if sight.writes and any((w.kv_usage or 0.0) * times > _KV_SAFE for w in workers):
        return False
    return _in_time(sight, fewer, times) and _fast(sight, times)


def _in_time(sight: _Sight, fewer: int, times: float) -> bool:
    limit, usual = sight.ttft_s, sight.usual
    if not sight.reads:
        return True
    if sight.profile is None or not sight.fresh or usual is None:
        waits = any(w.waiting > 0 for w in sight.load.workers)
        if limit is None or sight.seen.ttft_s is None:
            return not waits
        return not waits and sight.seen.ttft_s < limit * _FAR
    busy = usual.rate * sight.profile.prefill_s(0, round(sight.fresh)) / fewer
    # On average: a long prompt at one of them says nothing, the next request goes elsewhere.
    usual_s = fmean(sight.queue_s(worker, times) for worker in sight.load.workers)
    return busy < _BUSY and (limit is None or usual_s < (limit - sight.own_s) * _SAFE)


def _fast(sight: _Sight, times: float) -> bool:
    limit = sight.sla.itl_s
    if not sight.writes or limit is None:
        return True
    if sight.profile is None or sight.usual is None:
        return sight.seen.itl_s is None or sight.seen.itl_s < limit * _FAR
    return max(sight.gap_s(worker, times) for worker in sight.load.workers) < limit * _SAFE


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
