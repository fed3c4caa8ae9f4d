"""Who says how many: what the planner is told, the oracle's schedule, the classic formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import pytest

from dynctl.deploy.figures import Look, parse
from dynctl.observability.metrics import Metrics
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.perfmodel.simulation import Finished, Group, Service, Task, Told
from dynctl.perfmodel.trace import TraceRequest
from dynctl.planner.config import PlannerConfig, RoleConfig
from dynctl.planner.figures import observation
from dynctl.planner.observe import Observation
from dynctl.protocol.instances import Role
from dynctl.simulator.cluster import Cluster, Options
from dynctl.simulator.oracle import INTERVAL_S, Work, work_of
from dynctl.simulator.pilots import Classic, Planner, largest_batch
from dynctl.simulator.report import result_of
from dynctl.simulator.run import Runs
from dynctl.simulator.watch import Watch, quantile

LIMITS = Limits(kv_tokens=100_000, sequences=64, batched_tokens=8192)
GROUP = Group(role="aggregated", replicas=1, gpus=1, profile=DEFAULT, limits=LIMITS, most=9)
SERVICE = Service(name="t", groups=(GROUP,), sla=Sla(ttft_s=1.0, itl_s=0.02), boot_s=45.0)

SIX: dict[Role, int] = {"prefill": 4, "decode": 2}


def steady(count: int, gap_s: float, prompt: int = 2000, answer: int = 40) -> list[TraceRequest]:
    return [TraceRequest(i * gap_s, prompt, answer) for i in range(count)]


class Looks:
    """Keeps what a planner would have seen."""

    interval_s = 10.0

    def __init__(self) -> None:
        self.watch, self.seen = Watch(), list[Observation]()

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        if run.clock.now_s:
            self.seen.append(self.watch.look(run))
        return {}


def test_demand_is_what_arrived_however_much_waits() -> None:
    looks = Looks()
    Cluster(SERVICE, steady(600, 0.05), looks, Options()).run()
    assert [one.arrivals for one in looks.seen[:3]] == [200, 200, 200]
    assert looks.seen[0].isl == 2000
    assert looks.seen[0].isl_cv == 0.0
    assert looks.seen[1].osl == 40
    last = looks.seen[2]
    load = last.roles["aggregated"]
    assert (load.wanted, load.ready, load.starting, load.draining) == (1, 1, 0, 0)
    assert load.workers[0].running + load.workers[0].waiting + last.queued > 100
    assert last.ttft_s is not None
    assert last.ttft_mean_s is not None
    assert last.ttft_s > 1.0
    assert last.ttft_s >= last.ttft_mean_s
    assert sum(one.arrivals for one in looks.seen) == 600


def test_a_schedule_is_there_one_boot_before_the_demand_and_takes_nothing_away_for_less() -> None:
    needs = [1.0, 1.0, 1.0, 4.0, 1.0, 4.0, 1.0, 1.0, 1.0]
    work = Work((GROUP,), 45.0, tuple({"aggregated": need * INTERVAL_S} for need in needs))
    rows = [work.schedule({"aggregated": 1.0}).wanted_at(i)["aggregated"] for i in range(len(needs))]
    assert rows == [1, 4, 4, 4, 4, 4, 1, 1, 1]
    assert work.peak({"aggregated": 0.5}) == {"aggregated": 8}
    assert work.mean({"aggregated": 1.0}) == {"aggregated": 2}
    assert work.peak({"aggregated": 0.2}) == {"aggregated": 9}, "the most there may be"


def test_cached_tokens_are_no_work_and_each_role_has_its_own() -> None:
    requests = steady(10, 1.0)
    run = Cluster(SERVICE, requests, None, Options())
    run.run()
    whole = work_of(SERVICE, requests, run.answers).rows[0]["aggregated"]
    split = tuple(msgspec.structs.replace(GROUP, role=role) for role in ("prefill", "decode"))
    apart = work_of(msgspec.structs.replace(SERVICE, groups=split), requests, run.answers).rows[0]
    assert apart["prefill"] + apart["decode"] == pytest.approx(whole)
    assert apart["prefill"] == pytest.approx(10 * DEFAULT.prefill_s(0, 2000))
    for answer in run.answers:
        answer.cached = 1000
    less = work_of(SERVICE, requests, run.answers).rows[0]["aggregated"]
    assert less == pytest.approx(whole - 10 * DEFAULT.prefill_s(0, 1000))


def test_the_largest_batch_keeps_itl_sequences_and_kv() -> None:
    batch = largest_batch(GROUP, 2000.0, 0.008)
    assert DEFAULT.decode_s(batch, 2000.0) <= 0.008 < DEFAULT.decode_s(batch + 1, 2000.0)
    assert largest_batch(GROUP, 2000.0, None) == 50, "the KV cache"
    assert largest_batch(GROUP, 200.0, None) == 64, "the sequences"
    assert largest_batch(GROUP, 2000.0, 0.0001) == 1


def test_the_oracle_keeps_the_sla_with_no_more_than_the_peak_takes() -> None:
    busy = [TraceRequest(60.0 + i * 0.04, 2000, 40) for i in range(1500)]
    requests = sorted(steady(400, 0.5) + busy, key=lambda one: one.at_s)
    told: list[Told] = []
    runs = Runs(Task(service=SERVICE, trace="", compare=True), requests, told.append)
    results = {one.policy: one for one in runs.all(None)}
    assert set(results) == {"static", "peak", "mean", "classic", "oracle"}
    assert results["oracle"].keeps(SERVICE.sla)
    assert results["oracle"].gpu_hours < results["peak"].gpu_hours
    assert not results["static"].keeps(SERVICE.sla)
    finished = [one.result.policy for one in told if isinstance(one, Finished)]
    assert finished == ["static", "peak", "mean", "classic", "oracle"]


def test_no_oracle_where_no_schedule_keeps_the_sla() -> None:
    never = msgspec.structs.replace(SERVICE, sla=Sla(ttft_s=0.001))
    results = Runs(Task(service=never, trace="", compare=True), steady(100, 0.2), lambda told: None).all(None)
    assert [one.policy for one in results] == ["static", "peak", "mean", "classic"]


def turning(handover_s: float | None) -> tuple[Cluster, list[str]]:
    """The planner within six GPUs, as demand turns from prompts to answers."""
    limits = msgspec.structs.replace(LIMITS, kv_tokens=200_000, sequences=16)
    groups = tuple(
        Group(role=role, replicas=count, gpus=1, profile=DEFAULT, limits=limits)
        for role, count in SIX.items()
    )
    service = Service(name="t", groups=groups, sla=SERVICE.sla, boot_s=SERVICE.boot_s, handover_s=handover_s)
    config = PlannerConfig(
        sla=service.sla,
        roles={role: RoleConfig(profile=DEFAULT, limits=limits) for role in SIX},
        boot_s=service.boot_s,
        gpus=6,
        cooldown_s=60.0,
        interval_s=30.0,
    )
    later = [msgspec.structs.replace(one, at_s=200.0 + one.at_s) for one in steady(2000, 0.08, 500, 400)]
    pilot = Planner(config)
    run = Cluster(service, steady(2500, 0.08, 6000, 10) + later, pilot, Options())
    run.run()
    return run, pilot.reasons


def test_what_the_planner_moves_between_roles_is_there_without_a_boot() -> None:
    run, reasons = turning(1.5)
    assert any("prefill 4 -> 3" in why and "decode 2 -> 3" in why for why in reasons), reasons
    assert max(sum(one.there.values()) for one in run.fleet.presence) <= 6
    turned = [one for one in run.fleet.replicas.values() if one.taker is not None]
    assert turned
    assert all(one.taker is not None and one.taker.engine is one.engine for one in turned)
    booted, _ = turning(None)
    assert result_of("planner", run).met > result_of("planner", booted).met + 0.05


def test_one_that_waits_for_an_engine_is_on_its_way() -> None:
    class Turns(Looks):
        def wanted(self, run: Cluster) -> Mapping[Role, int]:
            super().wanted(run)
            return {"prefill": 1, "decode": 2} if run.clock.now_s else {}

    groups = tuple(msgspec.structs.replace(GROUP, role=role) for role in SIX)
    groups = (msgspec.structs.replace(groups[0], replicas=2), groups[1])
    turns = Turns()
    service = msgspec.structs.replace(SERVICE, groups=groups, handover_s=15.0)
    Cluster(service, steady(400, 0.1), turns, Options()).run()
    loads = [(seen.roles["prefill"], seen.roles["decode"]) for seen in turns.seen[:3]]
    assert [(load.draining, other.wanted, other.ready, other.starting) for load, other in loads] == [
        (0, 1, 1, 0),
        (1, 2, 1, 1),
        (0, 2, 2, 0),
    ]


def test_the_classic_formula_takes_what_was_completed_for_demand() -> None:
    """Twice what a replica can do comes in: only what it does is seen in the first interval."""
    interval_s, requests = 10.0, steady(900, 0.03)
    service = msgspec.structs.replace(SERVICE, sla=Sla(ttft_s=1.0))
    run = Cluster(service, requests, Classic(service, interval_s), Options())
    run.begin()
    while run.clock.now_s < interval_s * 1.5:
        run.clock.step()
    done = sum(1 for one in run.desk.answers.values() if one.ended_s and one.ended_s <= interval_s)
    seen = len(run.fleet.of("aggregated", "booting", "ready"))
    fresh_s = DEFAULT.step_s(DEFAULT.prefill_s(0, 2000), 0, 0.0)
    batch = largest_batch(GROUP, 2020.0, None)
    busy_s = fresh_s + 40 * DEFAULT.decode_s(batch, 2020.0) / batch
    assert done < 0.8 * interval_s / 0.03
    assert seen == math.ceil(done / interval_s * busy_s)


def test_quantiles_are_values_that_there_are() -> None:
    assert quantile([], 0.5) is None
    assert quantile([3.0, 1.0, 2.0], 0.0) == 1.0
    assert quantile(range(100), 0.95) == 95
    assert quantile([1.0], 0.99) == 1.0


def test_a_run_tells_what_frontends_histograms_would_tell() -> None:
    looks, metrics = Looks(), Metrics()
    requests = [TraceRequest(i * 0.04, 500 + 61 * (i % 50), 20 + i % 30) for i in range(400)]
    run = Cluster(SERVICE, requests, looks, Options())
    run.run()
    looks.wanted(run)
    share, seen = SERVICE.sla.percentile, looks.seen[0]
    begun = [one for one in run.answers if one.first_s is not None and one.first_s <= seen.span_s]
    ended = [one for one in begun if one.ended_s is not None and one.ended_s <= seen.span_s]
    for one in begun:
        metrics.histogram("time_to_first_token_seconds", model="m").observe(one.ttft_s or 0.0)
    for one in ended:
        metrics.histogram("time_per_output_token_seconds", model="m").observe(one.itl_s or 0.0)
    for request in requests[: seen.arrivals]:
        metrics.histogram("input_sequence_tokens", model="m").observe(request.prompt_tokens)
    empty, full = (
        Look(at, {"f": parse(one.render().decode())}) for at, one in ((0, Metrics()), (1, metrics))
    )
    told = observation(empty, full, {}, share)
    assert told.ttft_s == pytest.approx(seen.ttft_s)
    assert told.itl_s == pytest.approx(seen.itl_s)
    assert told.isl_cv == pytest.approx(seen.isl_cv)
    assert told.isl == pytest.approx(seen.isl)
