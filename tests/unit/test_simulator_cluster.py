"""The simulator: no request is lost, jumps change nothing, replicas come and go by the rules."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import msgspec
import pytest

from dynctl.errors import ProfileError
from dynctl.mocker.scheduler import Sequence
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.perfmodel.simulation import Group, Service
from dynctl.perfmodel.trace import TraceRequest, hashes
from dynctl.protocol.instances import Role
from dynctl.protocol.specs import ConditionalDisaggSpec, QueueSpec, RouterSpec
from dynctl.simulator.cluster import Cluster, Options, Pilot
from dynctl.simulator.report import result_of

BOOT_S = 5.0
SMALL = Limits(kv_tokens=12_000, sequences=8, batched_tokens=2048)
LARGE = Limits(kv_tokens=400_000, sequences=256, batched_tokens=8192)


def trace(count: int = 300, rate: float = 12.0, seed: int = 3) -> list[TraceRequest]:
    """Prompts that begin alike in part, of a few hundred tokens to some thousand."""
    rng, found, at_s = Random(seed), [], 0.0
    for number in range(count):
        at_s += rng.expovariate(rate)
        shared = rng.randrange(4)
        blocks = tuple(range(shared * 100, shared * 100 + rng.randrange(1, 5)))
        own = tuple(10_000 + number * 10 + i for i in range(rng.randrange(1, 4)))
        tokens = (len(blocks) + len(own)) * 512 - rng.randrange(500)
        found.append(TraceRequest(at_s, tokens, rng.randrange(1, 200), blocks + own))
    return found


def service(
    roles: Mapping[Role, int],
    limits: Limits = LARGE,
    router: RouterSpec | None = None,
    handover_s: float | None = None,
) -> Service:
    groups = [
        Group(role=role, replicas=count, gpus=2, profile=DEFAULT, limits=limits)
        for role, count in roles.items()
    ]
    return Service(
        name="t",
        groups=tuple(groups),
        router=router or RouterSpec(),
        sla=Sla(ttft_s=1.0, itl_s=0.05),
        boot_s=BOOT_S,
        handover_s=handover_s,
    )


def ran(
    roles: Mapping[Role, int],
    limits: Limits = LARGE,
    pilot: Pilot | None = None,
    requests: list[TraceRequest] | None = None,
    router: RouterSpec | None = None,
    **options: int,
) -> Cluster:
    run = Cluster(service(roles, limits, router), requests or trace(), pilot, Options(**options))  # type: ignore[arg-type]
    run.run()
    return run


class Steps:
    """Replicas by time: the last entry whose time has come."""

    interval_s = 1.0

    def __init__(self, steps: Mapping[float, Mapping[Role, int]]) -> None:
        self.steps = steps

    def wanted(self, run: Cluster) -> Mapping[Role, int]:
        due = [at_s for at_s in self.steps if at_s <= run.clock.now_s]
        return self.steps[max(due)] if due else {}


SPLIT: dict[Role, int] = {"prefill": 2, "decode": 2}
WHOLE: dict[Role, int] = {"aggregated": 3}
SPREADS = RouterSpec(mode="least_loaded")
SKIPS = RouterSpec(conditional_disagg=ConditionalDisaggSpec(mode="either", prefill_busy_tokens=4000))


@pytest.mark.parametrize(
    ("roles", "limits", "router", "block"),
    [
        (WHOLE, LARGE, None, 0),
        (WHOLE, LARGE, None, 16),
        (WHOLE, SMALL, None, 0),
        (SPLIT, LARGE, None, 0),
        (SPLIT, SMALL, None, 0),
        (SPLIT, LARGE, SKIPS, 0),
        (WHOLE, SMALL, RouterSpec(mode="round_robin"), 0),
    ],
    ids=["whole", "many-blocks", "whole-full", "split", "split-full", "split-skips", "round-robin"],
)
def test_jumps_give_what_single_steps_give(
    roles: dict[Role, int], limits: Limits, router: RouterSpec | None, block: int
) -> None:
    requests = trace()
    jumped = ran(roles, limits, requests=requests, router=router, block=block)
    stepped = ran(roles, limits, requests=requests, router=router, block=block, jumps=False)
    assert [one.cached for one in jumped.answers] == [one.cached for one in stepped.answers]
    for mine, theirs in zip(jumped.answers, stepped.answers, strict=True):
        assert mine.first_s == pytest.approx(theirs.first_s, abs=1e-6)
        assert mine.ended_s == pytest.approx(theirs.ended_s, abs=1e-6)
    for name, one in jumped.fleet.replicas.items():
        other = stepped.fleet.replicas[name]
        assert one.engine.scheduler.counters == other.engine.scheduler.counters
        assert one.engine.pool.cached() == other.engine.pool.cached()


def test_the_small_pools_are_really_short_of_blocks() -> None:
    """Else the cases above would not be about preemption and eviction."""
    run = ran(WHOLE, SMALL)
    assert sum(one.engine.scheduler.counters.preemptions for one in run.fleet.living) > 0


@pytest.mark.parametrize("roles", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("limits", [LARGE, SMALL], ids=["large", "small"])
def test_each_request_ends_once_with_all_its_tokens(roles: dict[Role, int], limits: Limits) -> None:
    requests = trace()
    run = ran(roles, limits, requests=requests)
    assert sorted(run.desk.over) == list(range(len(requests)))
    assert [one.tokens for one in run.answers] == [one.output_tokens for one in requests]
    for answer, request in zip(run.answers, requests, strict=True):
        assert answer.end == "done"
        assert answer.first_s is not None
        assert answer.ended_s is not None
        assert request.at_s < answer.first_s <= answer.ended_s
    for one in run.fleet.living:
        assert one.engine.empty
        assert one.engine.pool.free == one.engine.pool.count, "blocks are held by nobody"
    loads = [one.load for role in roles for one in run.router.eligible(role)]
    assert all(not load.requests and not load.prefill_tokens for load in loads)


def test_the_same_seed_gives_the_same_run() -> None:
    assert ran(WHOLE).answers == ran(WHOLE).answers


@pytest.mark.parametrize(
    ("roles", "fewer"), [(WHOLE, {"aggregated": 1}), (SPLIT, {"prefill": 1, "decode": 1})]
)
def test_a_drained_replica_ends_what_it_has_and_gets_nothing_more(
    roles: dict[Role, int], fewer: dict[Role, int]
) -> None:
    run = ran(roles, pilot=Steps({8.0: fewer}))
    assert all(one.end == "done" for one in run.answers)
    gone = [one for one in run.fleet.replicas.values() if one.state == "ended"]
    assert len(gone) == sum(roles.values()) - sum(fewer.values())
    assert any(one.ended_s is not None and one.ended_s > 8.0 for one in gone), "none had work left"
    for one in gone:
        assert one.engine.empty
        assert set(one.engine.scheduler.counters.finished.items()) >= {("abort", 0), ("error", 0)}
    assert result_of("t", run).aborted == 0
    assert [one.state for one in run.fleet.living] == ["ready"] * sum(fewer.values())


def test_what_is_drained_is_paid_for_until_its_end_and_boots_from_their_start() -> None:
    run = ran(WHOLE, pilot=Steps({4.0: {"aggregated": 4}, 12.0: {"aggregated": 2}}), router=SPREADS)
    new = run.fleet.replicas["aggregated-3"]
    assert new.started_s == 4.0
    queries = new.engine.scheduler.counters.prefix_queries
    assert queries > 0, "the new one got nothing"
    end_s = run.clock.now_s
    paid = 0.0
    for one in run.fleet.replicas.values():
        until_s = end_s if one.ended_s is None else one.ended_s
        paid += 2 * (until_s - one.started_s)
    assert run.fleet.gpu_s(end_s) == pytest.approx(paid)
    assert result_of("t", run).gpu_hours == pytest.approx(paid / 3600)


def test_a_replica_gets_no_request_before_it_has_booted() -> None:
    run = Cluster(service(WHOLE, router=SPREADS), trace(), Steps({4.0: {"aggregated": 4}}), Options())
    added: list[float] = []
    run.begin()
    while run.clock.now_s <= 4.0:
        run.clock.step()
    engine = run.fleet.replicas["aggregated-3"].engine
    add = engine.scheduler.add

    def noted(seq: Sequence, now_s: float) -> None:
        added.append(now_s)
        add(seq, now_s)

    engine.scheduler.add = noted  # type: ignore[method-assign]
    while len(run.desk.over) < len(run.requests):
        run.clock.step()
    assert added
    assert min(added) >= 4.0 + BOOT_S


def test_a_replica_that_is_unwanted_while_it_boots_ends_at_once() -> None:
    run = ran(WHOLE, pilot=Steps({2.0: {"aggregated": 5}, 4.0: {"aggregated": 3}}))
    short = [run.fleet.replicas[f"aggregated-{number}"] for number in (3, 4)]
    assert [(one.started_s, one.ended_s) for one in short] == [(2.0, 4.0)] * 2
    assert {one.state for one in run.fleet.living} == {"ready"}
    assert len(run.fleet.living) == 3


THREE: dict[Role, int] = {"prefill": 3, "decode": 2}
TO_DECODE: dict[Role, int] = {"prefill": 2, "decode": 3}


def turned(
    steps: Mapping[float, Mapping[Role, int]], handover_s: float | None = 1.5, **options: bool
) -> Cluster:
    """Where workers may change their role."""
    run = Cluster(service(THREE, handover_s=handover_s), trace(), Steps(steps), Options(**options))  # type: ignore[arg-type]
    run.run()
    assert all(one.end == "done" for one in run.answers)
    assert result_of("t", run).aborted == 0
    return run


def test_a_worker_that_changes_its_role_takes_a_handover_and_no_boot() -> None:
    run = turned({8.0: TO_DECODE})
    giver, taker = run.fleet.replicas["prefill-2"], run.fleet.replicas["decode-2"]
    assert taker.engine is giver.engine
    assert len(run.fleet.engines) == 5
    assert giver.state == "ended"
    assert giver.ended_s == taker.started_s
    assert 8.0 + 1.5 <= taker.started_s < 8.0 + BOOT_S
    assert taker.engine.scheduler.counters.finished["length"] > 0
    assert max(sum(one.there.values()) for one in run.fleet.presence) == 5
    first = next(one.at_s for one in run.fleet.presence if one.ready["decode"] == 3)
    assert first == taker.started_s
    end_s = run.clock.now_s
    assert run.fleet.gpu_s(end_s) == pytest.approx(5 * 2 * end_s)


def test_a_worker_that_changes_its_role_has_its_last_request_behind_it() -> None:
    """Where an answer takes far longer than the handover."""
    requests = [TraceRequest(0.1 * number, 600, 2000) for number in range(8)]
    run = Cluster(
        service({"prefill": 1, "decode": 2}, router=SPREADS, handover_s=1.5),
        [*requests, TraceRequest(60.0, 600, 2)],
        Steps({2.0: {"prefill": 2, "decode": 1}}),
        Options(),
    )
    run.run()
    giver, taker = run.fleet.replicas["decode-1"], run.fleet.replicas["prefill-1"]
    assert giver.ended_s == taker.started_s
    ends = [one.ended_s for one in run.answers if one.ended_s is not None]
    assert any(taker.started_s == pytest.approx(end_s + 1.5) for end_s in ends)
    assert taker.started_s > 10.0
    assert [one.tokens for one in run.answers] == [2000] * 8 + [2]


def test_what_it_has_cached_is_known_of_it_once_it_reads_prompts() -> None:
    alone = [TraceRequest(0.2 * n, 1000, 20, (2 * n, 2 * n + 1)) for n in range(80)]
    run = Cluster(service(TO_DECODE, handover_s=1.5), alone, Steps({8.0: THREE}), Options())
    run.begin()
    while (taker := run.fleet.replicas.get("prefill-2")) is None or taker.state != "ready":
        assert run.clock.step()
    held = {int(digest) for digest in taker.engine.pool.cached()}
    chains = [chain[:1] for chain in hashes(alone, run.size) if chain[0] in held]
    assert chains
    assert all(run.router._index.match(chain).get(("prefill-2", 0)) == 1 for chain in chains)


def test_a_role_that_nobody_leaves_for_gets_one_that_boots() -> None:
    run = turned({8.0: {"prefill": 2, "decode": 4}})
    assert run.fleet.replicas["decode-2"].engine is run.fleet.replicas["prefill-2"].engine
    assert run.fleet.replicas["decode-3"].started_s == 8.0
    assert len(run.fleet.engines) == 6


def test_where_engines_cannot_change_their_role_another_one_boots() -> None:
    run = turned({8.0: TO_DECODE}, None)
    assert run.fleet.replicas["decode-2"].started_s == 8.0
    assert len(run.fleet.engines) == 6


def test_one_that_is_not_wanted_any_more_when_its_engine_comes_is_not_there() -> None:
    run = turned({8.0: TO_DECODE, 9.0: {"prefill": 2, "decode": 2}})
    assert run.fleet.replicas["decode-2"].state == "ended"
    assert run.fleet.replicas["decode-2"].gpu_s(run.clock.now_s) == 0.0
    assert run.fleet.replicas["prefill-2"].state == "ended"
    assert len(run.fleet.living) == 4


def test_one_that_still_boots_has_no_engine_to_go_on_with() -> None:
    run = turned({8.0: {"prefill": 4, "decode": 2}, 9.0: {"prefill": 3, "decode": 3}})
    assert run.fleet.replicas["prefill-3"].ended_s == 9.0
    assert run.fleet.replicas["decode-2"].started_s == 9.0


def test_jumps_change_nothing_about_who_changes_its_role() -> None:
    steps = {4.0: TO_DECODE, 12.0: THREE}
    jumped, stepped = turned(steps), turned(steps, jumps=False)
    assert jumped.fleet.replicas["prefill-3"].engine is jumped.fleet.replicas["decode-2"].engine
    for mine, theirs in zip(jumped.answers, stepped.answers, strict=True):
        assert mine.ended_s == pytest.approx(theirs.ended_s, abs=1e-6)
        assert mine.cached == theirs.cached


def test_bounds_of_a_role_are_kept() -> None:
    tight = service(WHOLE)
    groups = (msgspec.structs.replace(tight.groups[0], least=2, most=4),)
    run = Cluster(
        msgspec.structs.replace(tight, groups=groups),
        trace(),
        Steps({2.0: {"aggregated": 9}, 15.0: {"aggregated": 0}}),
        Options(),
    )
    run.run()
    counts = [one.ready["aggregated"] for one in run.fleet.presence]
    assert max(counts) == 4
    assert counts[-1] == 2


def test_who_waits_too_long_or_finds_no_room_is_refused_and_missed() -> None:
    crowd = [TraceRequest(0.0, 8000, 50) for _ in range(60)]
    spec = RouterSpec(queue=QueueSpec(threshold=1.0, limit=10, deadline_s=3.0))
    later = [msgspec.structs.replace(one, at_s=2.0) for one in crowd]
    run = ran({"aggregated": 1}, requests=crowd + later, router=spec)
    told = result_of("t", run)
    assert told.refused > 0
    assert told.done + told.refused == 120
    assert told.met <= told.done / 120
    waited = [one for one in run.answers if one.end == "refused" and one.ended_s is None]
    assert len(waited) == told.refused


def test_a_prompt_that_no_replica_can_hold_is_refused_before_the_start() -> None:
    with pytest.raises(ProfileError, match="does not fit into the 11776 KV tokens"):
        Cluster(service(WHOLE, SMALL), [TraceRequest(0.0, 12_000, 1)], None, Options())


def test_a_closed_loop_has_so_many_in_flight() -> None:
    requests = trace(100)
    run = ran(WHOLE, requests=requests, in_flight=5)
    ends = sorted(one.ended_s or 0.0 for one in run.answers)
    starts = sorted(one.arrived_s for one in run.answers)
    assert starts[:5] == [0.0] * 5
    assert starts[5:] == ends[:95]
