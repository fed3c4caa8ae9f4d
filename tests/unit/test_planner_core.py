"""Decisions: what grows, what goes, what is held, and why."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.fit import scaled
from dynctl.perfmodel.profile import Profile
from dynctl.planner.capacity import FIRST_STEPS, Costs, Forecast
from dynctl.planner.config import RoleConfig
from dynctl.planner.core import Decision, decide, refused
from dynctl.planner.memory import Interval, PlannerState
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role
from tests.unit.planner_rig import BOTH, LAW, LIMITS, SLA, World, config

RATES = st.lists(st.floats(min_value=0.0, max_value=120.0), min_size=1, max_size=6)
MODES = st.sampled_from(["throughput", "load", "both"])


@settings(max_examples=12, deadline=None)
@given(RATES, MODES, st.integers(2, 14), st.integers(1, 3), st.integers(1, 2))
def test_targets_stay_within_budget_minimum_and_maximum(
    rates: list[float], mode: str, budget: int, most: int, least: int
) -> None:
    roles = {
        "prefill": RoleConfig(minimum=1, maximum=4, gpus=1, profile=LAW),
        "decode": RoleConfig(minimum=least, maximum=least + most, gpus=2, profile=LAW),
    }
    budget = max(budget, 1 + 2 * least)
    world = World(config(mode=mode, gpus=budget, roles=roles), {"prefill": 1, "decode": least})
    for rate in rates:
        world.run(rate, 120.0)
    for decision in world.decisions:
        targets = decision.targets
        assert targets["prefill"] + 2 * targets["decode"] <= budget
        assert 1 <= targets["prefill"] <= 4
        assert least <= targets["decode"] <= least + most
        assert all(one.why for one in decision.roles.values())


@settings(max_examples=6, deadline=None)
@given(st.floats(min_value=0.5, max_value=90.0), MODES, st.integers(1, 50))
def test_a_constant_demand_does_not_make_it_swing(rate: float, mode: str, seed: int) -> None:
    world = World(config(mode=mode), {"prefill": 2, "decode": 2}, seed=seed)
    world.run(rate, 1800.0)  # it finds its place
    later = world.run(rate, 2400.0)
    ways = [one.code for decision in later for one in decision.roles.values() if one.code != "hold"]
    assert len(ways) <= 2, [decision.reason for decision in later]


@settings(max_examples=6, deadline=None)
@given(MODES, st.integers(1, 6), st.integers(1, 6))
def test_without_demand_it_comes_down_to_the_minimum(mode: str, prefill: int, decode: int) -> None:
    world = World(config(mode=mode), {"prefill": prefill, "decode": decode})
    world.run(10.0, 300.0)
    world.run(0.0, 3000.0)
    assert world.wanted == {"prefill": 1, "decode": 1}


@settings(max_examples=6, deadline=None)
@given(MODES, st.sampled_from(["constant", "moving_average", "arima", "kalman", "seasonal"]))
def test_saturation_makes_it_grow_until_demand_is_borne(mode: str, predictor: str) -> None:
    world = World(config(mode=mode, predictor=predictor), {"prefill": 1, "decode": 1})
    world.run(60.0, 2400.0)
    assert world.wanted["prefill"] * (1.0 / 0.065) > 60.0


def test_demand_that_rises_is_met_one_boot_ahead() -> None:
    world = World(config(mode="throughput", boot_s=300.0), {"prefill": 1, "decode": 1}, boot_s=300.0)
    rate, short = 5.0, 0
    world.run(rate, 600.0)
    for _ in range(30):
        rate += 3.0
        world.run(rate, 60.0)
        short += rate * 0.065 > world.ready("prefill")
    assert short <= 6  # as long as a boot takes: nobody saw the rise coming


def test_demand_about_the_border_between_two_counts_does_not_make_it_swing() -> None:
    world = World(
        config(mode="throughput", cooldown_s=60.0, predictor="constant"), {"prefill": 1, "decode": 1}
    )
    costs, usual = Costs(SLA, "least_work", {"prefill": LAW, "decode": LAW}), Forecast(1.0, 2000.0, 200.0)
    border = next(
        rate / 10.0
        for rate in range(10, 900)
        if costs.replicas("prefill", replace(usual, rate=rate / 10.0 * 1.1), 12) > 2
    )
    changes = []
    for turn in range(20):
        changes += world.run(border * (0.97 if turn % 2 else 1.03), 300.0)
    assert len(changes) <= 3, [one.reason for one in changes]


def test_a_saturated_service_is_seen_by_its_arrivals_though_little_is_answered() -> None:
    world = World(config(mode="throughput"), {"prefill": 1, "decode": 1})
    world.look = lambda seen: msgspec.structs.replace(seen, osl=None if world.now > 100 else seen.osl)
    world.run(40.0, 300.0)
    assert world.wanted["prefill"] >= 4


def test_it_learns_costs_and_plans_by_them() -> None:
    learning = RoleConfig(maximum=12, limits=LIMITS)
    world = World(config(roles={"prefill": learning, "decode": learning}), {"prefill": 1, "decode": 1})
    world.run(3.0, 300.0)
    assert dict(world.decisions[-1].by) == {"prefill": "learnt", "decode": "learnt"}
    world.run(50.0, 600.0)
    assert world.wanted["prefill"] >= 4


@pytest.mark.parametrize("wrong", [0.4, 2.5])
def test_an_estimate_that_is_wrong_is_corrected_by_what_is_seen_and_a_measured_profile_is_not(
    wrong: float,
) -> None:
    reading_s = LAW.step_s(LAW.prefill_s(0, 2000), 0, 0)
    own_s = reading_s + LAW.transfer_s(2000) + FIRST_STEPS * LAW.decode_s(1, 2000)

    def floor(profile: Profile) -> int:
        role = RoleConfig(maximum=40, profile=profile)
        rules = config(mode="throughput", roles={"prefill": role, "decode": role})
        world = World(rules, {"prefill": 1, "decode": 1})
        world.look = lambda one: msgspec.structs.replace(one, ttft_mean_s=own_s, roles=without_queue(one))
        world.run(80.0, 300.0)
        return world.decisions[-1].roles["prefill"].floor or 0

    estimate = msgspec.structs.replace(scaled(LAW, prefill=wrong, decode=1.0), source="estimate")
    right = floor(LAW)
    assert abs(floor(msgspec.structs.replace(estimate, source="measured")) - right) > 1
    assert floor(estimate) == pytest.approx(right, abs=1)


def without_queue(seen: Observation) -> dict[Role, RoleLoad]:
    return {
        role: msgspec.structs.replace(
            load, workers=tuple(msgspec.structs.replace(one, waiting=0) for one in load.workers)
        )
        for role, load in seen.roles.items()
    }


def test_aggregated_workers_are_planned_for_as_one() -> None:
    world = World(config(roles={"aggregated": BOTH}), {"aggregated": 1})
    world.run(40.0, 900.0)
    grown = world.wanted["aggregated"]
    assert grown >= 4
    world.run(2.0, 3600.0)
    assert world.wanted["aggregated"] < grown


def seen(load: RoleLoad, **more: object) -> Observation:
    fields: dict[str, object] = {"span_s": 5.0, "arrivals": 10, "isl": 2000.0, "osl": 200.0, **more}
    return Observation(roles={"aggregated": load}, **fields)  # type: ignore[arg-type]


def load(wanted: int, ready: int, **more: object) -> RoleLoad:
    worker = WorkerLoad(id="w", running=1.0)
    return RoleLoad(wanted=wanted, ready=ready, workers=(worker,) * ready, **more)  # type: ignore[arg-type]


ONE = config(roles={"aggregated": BOTH}, mode="throughput")
LARGE = replace(BOTH, maximum=40)


def test_growth_that_fails_is_undone_and_not_tried_again_at_once() -> None:
    state = PlannerState(past=[Interval(40.0, 2000.0, 200.0)] * 5)  # type: ignore[arg-type]
    rules = replace(ONE, interval_s=5.0)
    first = decide(state, seen(load(1, 1), arrivals=200), rules, 0.0)
    assert first.roles["aggregated"].code == "up"
    target = first.targets["aggregated"]
    failing = load(target, 1, failed=1, starting=target - 2)
    undone = decide(state, seen(failing, arrivals=200), rules, 10.0)
    assert (undone.roles["aggregated"].code, undone.targets["aggregated"]) == ("undo", 1)
    assert "a new replica has failed" in undone.reason
    held = decide(state, seen(load(1, 1), arrivals=200), rules, 15.0)
    assert (held.roles["aggregated"].code, held.changed) == ("hold", False)
    assert "tried again in" in held.reason
    again = decide(state, seen(load(1, 1), arrivals=200), rules, 10.0 + rules.retry_s + 1.0)
    assert again.roles["aggregated"].code == "up"


def test_growth_that_never_gets_ready_is_undone_at_the_limit() -> None:
    state = PlannerState(past=[Interval(40.0, 2000.0, 200.0)] * 5)  # type: ignore[arg-type]
    rules = replace(ONE, interval_s=5.0, limit_s=60.0)
    target = decide(state, seen(load(1, 1), arrivals=200), rules, 0.0).targets["aggregated"]
    slow = load(target, 1, starting=target - 1)
    assert not decide(state, seen(slow, arrivals=200), rules, 59.0).changed
    undone = decide(state, seen(slow, arrivals=200), rules, 61.0)
    assert undone.targets == {"aggregated": 1}
    assert "not ready after 60 s" in undone.reason


def test_what_is_refused_waits_longer_each_time_and_only_that_way() -> None:
    state, rules = PlannerState(), replace(ONE, roles={"aggregated": replace(BOTH, minimum=2)})
    waits, now = [], 0.0
    for _ in range(3):
        while not (decision := decide(state, seen(load(1, 1)), rules, now)).changed:
            now += 5.0
        waits.append(now)
        refused(state, rules, decision, now, "no GPU is free")
        assert "no GPU is free" in decide(state, seen(load(1, 1)), rules, now + 5.0).reason
    assert [b - a for a, b in pairwise(waits)] == [120.0, 240.0]
    assert not state.roles["aggregated"].block("down", now)


def test_what_is_refused_to_one_role_is_not_held_against_the_other() -> None:
    world = World(config(mode="throughput"), {"prefill": 1, "decode": 1})
    (decision,) = world.run(20.0, 60.0)
    assert decision.targets["decode"] == 1
    refused(world.state, world.rules, decision, world.now, "no GPU is free")
    assert world.state.roles["prefill"].block("up", world.now)
    assert not world.state.roles["decode"].block("up", world.now)


def test_a_scale_by_hand_is_kept_for_a_cool_down() -> None:
    world = World(replace(ONE, cooldown_s=60.0), {"aggregated": 1})
    world.run(5.0, 300.0)
    world.wanted["aggregated"] = 3
    assert not world.run(5.0, 55.0)
    assert world.run(5.0, 60.0)[0].targets == {"aggregated": 1}


def test_a_change_that_is_under_way_holds_what_would_shrink() -> None:
    state = PlannerState()
    for now in range(0, 400, 5):
        held = decide(state, seen(load(3, 2, draining=1)), ONE, float(now))
        assert not held.changed
    assert "a change is under way: 1 draining" in held.reason
    starts = decide(state, seen(load(3, 2, starting=1)), ONE, 400.0)
    assert "1 starting" in starts.reason


def test_the_maximum_holds_and_is_the_reason_that_is_told() -> None:
    state = PlannerState(past=[Interval(90.0, 2000.0, 200.0)] * 5)  # type: ignore[arg-type]
    rules = replace(ONE, interval_s=5.0, roles={"aggregated": replace(BOTH, maximum=2)})
    decision = decide(state, seen(load(2, 2), arrivals=450), rules, 0.0)
    assert not decision.changed
    assert "but 2 is its maximum" in decision.reason


def test_replicas_beyond_the_bounds_are_brought_within() -> None:
    rules = replace(ONE, roles={"aggregated": replace(BOTH, minimum=2, maximum=3)})
    assert decide(PlannerState(), seen(load(5, 5)), rules, 0.0).targets == {"aggregated": 3}
    assert decide(PlannerState(), seen(load(1, 1)), rules, 0.0).targets == {"aggregated": 2}


def test_one_role_gives_its_gpus_to_the_other_when_there_are_no_more() -> None:
    rules = config(mode="throughput", gpus=6, cooldown_s=30.0)
    world = World(rules, {"prefill": 1, "decode": 5})
    made = world.run(60.0, 300.0)
    assert world.wanted["prefill"] == 4
    assert world.wanted["decode"] == 2
    flip = next(one for one in made if one.targets["prefill"] > 1)
    assert "6 GPUs allow" in flip.reason


def test_shares_of_a_budget_that_is_too_small_are_not_shifted_for_little() -> None:
    world = World(config(mode="throughput", gpus=5), {"prefill": 1, "decode": 1})
    world.run(90.0, 900.0)
    assert not world.run(93.0, 1800.0)


def test_prompts_of_unknown_length_leave_it_to_the_load() -> None:
    world = World(config(mode="both"), {"prefill": 1, "decode": 1})
    world.look = lambda one: msgspec.structs.replace(one, isl=None, ttft_s=3.0)
    world.run(40.0, 600.0)
    assert world.decisions[-1].ahead is None
    assert world.wanted["prefill"] > 1


def test_a_level_that_nothing_can_keep_does_not_make_it_grow_without_end() -> None:
    world = World(config(sla=Sla(ttft_s=0.001, itl_s=0.0001)), {"prefill": 2, "decode": 2})
    world.run(5.0, 1800.0)
    assert world.wanted["prefill"] + world.wanted["decode"] <= 4


def test_a_decision_is_the_same_for_the_same_past() -> None:
    def told() -> list[Decision]:
        world = World(config(), {"prefill": 1, "decode": 1})
        world.run(20.0, 600.0)
        return world.decisions

    assert told() == told()


def test_boots_that_were_seen_are_how_far_ahead_it_looks() -> None:
    world = World(config(mode="throughput", boot_s=10.0), {"prefill": 1, "decode": 1}, boot_s=200.0)
    world.run(40.0, 600.0)
    assert world.state.boot_s == pytest.approx(200.0, abs=10.0)
    assert world.decisions[-1].ahead is not None
    assert math.isclose(world.decisions[-1].ahead.horizon_s, world.state.boot_s + 60.0)


def test_replicas_that_go_on_with_the_engines_of_others_tell_nothing_of_boots() -> None:
    """Else it would look a few seconds ahead, and be late when engines have to start again."""
    rules = config(mode="throughput", gpus=6, cooldown_s=60.0, boot_s=200.0)
    world = World(rules, {"prefill": 1, "decode": 1}, boot_s=200.0, isl=4000.0, osl=50.0)
    world.run(30.0, 1500.0)
    booted_s = world.state.boot_s
    world.boot_s, world.isl, world.osl = 2.0, 600.0, 3000.0
    moved = world.run(30.0, 1500.0)
    assert all(one.roles["prefill"].target < one.roles["prefill"].current for one in moved)
    assert sum(one.roles["decode"].target > one.roles["decode"].current for one in moved) >= 2
    assert world.state.boot_s == booted_s >= 190.0


def test_a_role_beyond_its_bounds_is_moved_though_the_budget_is_short() -> None:
    roles = {"prefill": replace(BOTH, maximum=3), "decode": BOTH}
    world = World(config(mode="throughput", gpus=5, roles=roles), {"prefill": 3, "decode": 1})
    world.run(90.0, 300.0)
    world.wanted["prefill"] = 5
    world.run(90.0, 30.0)
    assert world.wanted["prefill"] <= 3


def test_caches_and_the_spread_of_prompts_are_planned_for() -> None:
    def needed(**more: float) -> int:
        world = World(config(mode="throughput"), {"prefill": 1, "decode": 1})
        world.look = lambda one: msgspec.structs.replace(one, **more)
        world.run(60.0, 600.0)
        return world.wanted["prefill"]

    assert needed(hit_rate=0.7) < needed() < needed(isl_cv=1.5)


def test_kv_that_engines_tell_bounds_what_is_learnt() -> None:
    def needed(kv_tokens: int) -> int:
        learning = RoleConfig(maximum=12, limits=LIMITS)
        world = World(config(roles={"prefill": BOTH, "decode": learning}), {"prefill": 2, "decode": 1})
        world.look = lambda one: msgspec.structs.replace(one, kv_tokens=kv_tokens)
        world.run(20.0, 600.0)
        return world.decisions[-1].roles["decode"].floor or 0

    assert needed(20_000) > needed(400_000)


def test_what_nobody_asked_of_decode_is_not_learnt_from() -> None:
    learning = RoleConfig(maximum=12, limits=LIMITS)
    world = World(config(roles={"prefill": learning, "decode": learning}), {"prefill": 1, "decode": 1})
    world.look = lambda one: msgspec.structs.replace(
        one, roles={role: msgspec.structs.replace(load, workers=()) for role, load in one.roles.items()}
    )
    world.run(3.0, 300.0)
    assert "decode" not in world.decisions[-1].by
    idle = tuple(WorkerLoad(id="w") for _ in range(1))
    world.look = lambda one: msgspec.structs.replace(
        one, roles={role: msgspec.structs.replace(load, workers=idle) for role, load in one.roles.items()}
    )
    world.run(3.0, 300.0)
    assert "decode" not in world.decisions[-1].by


def late(one: Observation) -> Observation:
    """Users get six times the level while anything waits."""
    waits = any(worker.waiting for load in one.roles.values() for worker in load.workers)
    return msgspec.structs.replace(one, ttft_s=3.0 if waits else 0.1)


def test_the_reason_is_that_of_the_loop_whose_number_it_is() -> None:
    world = World(config(roles={"prefill": LARGE, "decode": LARGE}), {"prefill": 1, "decode": 1}, look=late)
    made = [one for rate in (20.0, 60.0, 5.0, 140.0) for one in world.run(rate, 600.0)]
    grown = [one for decision in made for one in decision.roles.values() if one.code == "up"]
    assert {one.why.startswith("demand takes") for one in grown} == {True, False}
    for one in grown:
        assert (one.why == f"demand takes {one.target}") == (one.target == one.floor), one


def test_who_begins_with_far_too_few_adds_what_the_load_takes_at_once() -> None:
    world = World(config(roles={"prefill": LARGE, "decode": LARGE}), {"prefill": 1, "decode": 1}, look=late)
    (made,) = world.run(100.0, 20.0)
    assert world.now <= 20.0
    assert made.targets["prefill"] >= 100.0 * 0.065


def test_what_waits_is_part_of_what_load_asks_for() -> None:
    def asked_for(waiting: float) -> int:
        state = PlannerState(past=[Interval(20.0, 2000.0, 200.0)] * 5)  # type: ignore[arg-type]
        worker = WorkerLoad(id="w", prefill_tokens=waiting * 2000.0, waiting=waiting)
        roles: dict[Role, RoleLoad] = {
            "prefill": RoleLoad(wanted=2, ready=2, workers=(worker,) * 2),
            "decode": RoleLoad(wanted=2, ready=2, workers=(WorkerLoad(id="d", running=5.0),) * 2),
        }
        rules = config(roles={"prefill": LARGE, "decode": LARGE})
        for now in (0.0, 5.0, 10.0):
            one = Observation(span_s=5.0, arrivals=100, roles=roles, isl=2000.0, osl=200.0)
            made = decide(state, one, rules, now)
        return made.targets["prefill"]

    assert asked_for(20.0) < asked_for(1000.0) < asked_for(4000.0)


@pytest.mark.parametrize(("ttft_s", "wanted"), [(0.7, 5), (1.5, 8)])
def test_where_costs_are_not_known_it_doubles_once_users_get_twice_the_level(
    ttft_s: float, wanted: int
) -> None:
    world = World(
        config(roles={"prefill": RoleConfig(), "decode": RoleConfig()}), {"prefill": 4, "decode": 1}
    )
    world.look = lambda one: msgspec.structs.replace(one, ttft_s=ttft_s, isl=None)
    world.run(100.0, 20.0)
    assert world.wanted["prefill"] == wanted


def test_advice_stands_and_is_no_change_by_hand() -> None:
    rules = replace(ONE, advisory=True, cooldown_s=60.0, interval_s=15.0)
    state = PlannerState()
    more = [decide(state, seen(load(1, 1), arrivals=200), rules, 5.0 * i) for i in range(1, 30)]
    first = next(i for i, one in enumerate(more) if one.changed)
    assert {one.roles["aggregated"].code for one in more[first:]} == {"up"}
    state = PlannerState()
    fewer = [decide(state, seen(load(6, 6)), rules, 5.0 * i) for i in range(1, 60)]
    first = next(i for i, one in enumerate(fewer) if one.changed)
    assert {one.roles["aggregated"].code for one in fewer[first:]} == {"down"}


def test_demand_that_falls_is_followed_down_without_a_cool_down_for_each_step() -> None:
    world = World(
        config(mode="throughput", roles={"prefill": LARGE, "decode": LARGE}), {"prefill": 9, "decode": 2}
    )
    world.run(110.0, 900.0)
    most = world.wanted["prefill"]
    for step in range(10):
        world.run(110.0 - 10.0 * (step + 1), 60.0)
    world.run(10.0, 240.0)
    assert world.wanted["prefill"] < most / 4
