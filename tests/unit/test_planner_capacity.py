"""Replicas for a demand, within a budget, by the queueing model and by the classic formula."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import DEFAULT, Profile
from dynctl.planner.budget import share, within
from dynctl.planner.capacity import Costs, Forecast, batched_of
from dynctl.planner.classic import Interval, Sizes, itl_target, replicas
from dynctl.protocol.instances import Role
from tests.unit.planner_rig import LAW, SLA

KNOWN: dict[Role, Profile] = {"prefill": LAW, "decode": LAW, "aggregated": LAW}
ROLES: tuple[Role, ...] = ("prefill", "decode", "aggregated")
COSTS = Costs(SLA, "least_work", KNOWN)
USUAL = Forecast(rate=20.0, isl=2000.0, osl=200.0)


@pytest.mark.parametrize("role", ROLES)
def test_more_demand_never_takes_fewer(role: Role) -> None:
    counts = [
        COSTS.replicas(role, Forecast(rate, 2000.0, 200.0), 64)
        for rate in (0.0, 1.0, 10.0, 40.0, 90.0, 200.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] > 2


def test_prefill_leaves_room_for_queues() -> None:
    mean_s = LAW.prefill.seconds[0] + LAW.prefill_s(0, 2000)
    assert 20.0 * mean_s < 2.0
    assert COSTS.replicas("prefill", USUAL, 64) >= 2
    strict = Costs(Sla(ttft_s=0.15, percentile=0.99), "least_work", KNOWN)
    assert strict.replicas("prefill", USUAL, 64) > COSTS.replicas("prefill", USUAL, 64)


def test_prompts_that_spread_take_more_and_cached_ones_fewer() -> None:
    even = COSTS.replicas("prefill", Forecast(60.0, 2000.0, 200.0), 64)
    assert COSTS.replicas("prefill", Forecast(60.0, 2000.0, 200.0, isl_cv=1.5), 64) > even
    assert COSTS.replicas("prefill", Forecast(60.0, 2000.0, 200.0, hit_rate=0.7), 64) < even


@pytest.mark.parametrize("role", ROLES)
def test_what_nobody_can_keep_takes_as_many_as_bear_the_load(role: Role) -> None:
    hopeless = Costs(Sla(ttft_s=0.001, itl_s=0.0001), "least_work", KNOWN)
    assert hopeless.replicas(role, Forecast(5.0, 2000.0, 200.0), 64) <= 2
    assert hopeless.replicas(role, Forecast(100.0, 2000.0, 200.0), 64) < 32


def test_too_much_for_all_gives_all() -> None:
    assert COSTS.replicas("prefill", Forecast(1e6, 2000.0, 200.0), 9) == 9


def test_without_a_level_for_first_tokens_workers_are_kept_busy() -> None:
    lazy = Costs(Sla(itl_s=0.05), "least_work", {"prefill": LAW})
    assert lazy.replicas("prefill", Forecast(40.0, 2000.0, 200.0), 64) == 3


def test_a_prompt_that_is_larger_than_the_kv_does_not_break_it() -> None:
    assert COSTS.replicas("decode", Forecast(1.0, 500_000.0, 10.0), 8) == 1
    assert COSTS.replicas("aggregated", Forecast(1.0, 500_000.0, 10.0), 8) == 8


def test_log_normal_lengths_keep_their_mean() -> None:
    demand = Forecast(1.0, 2000.0, 50.0, isl_cv=1.0).demand()
    assert demand.isl == pytest.approx(2000.0, rel=0.01)
    assert len(set(demand.lengths)) > 8
    assert Forecast(1.0, 0.2, 0.0, isl_cv=9.0, hit_rate=2.0).demand().hit_rate == 0.99


def test_a_profile_without_limits_has_usual_ones() -> None:
    assert batched_of(DEFAULT) == 8192


@settings(max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=2), st.integers(0, 30), st.integers(1, 4))
def test_a_budget_is_kept_and_used(needs: list[int], budget: int, gpus: int) -> None:
    wanted: dict[Role, int] = {"prefill": needs[0], "decode": needs[1]}
    sizes: dict[Role, int] = {"prefill": 1, "decode": gpus}
    given_ = within(wanted, {"prefill": 1, "decode": 1}, sizes, budget)
    used = sum(given_[role] * sizes[role] for role in given_)
    assert all(1 <= given_[role] <= wanted[role] for role in given_)
    if budget:
        assert used <= max(budget, 1 + gpus)
        left = [role for role in given_ if given_[role] < wanted[role]]
        assert not left or budget - used < max(sizes[role] for role in left)
    else:
        assert given_ == wanted
    assert 0.0 < share(given_, wanted) <= 1.0


def test_what_is_short_is_short_in_proportion() -> None:
    given_ = within({"prefill": 8, "decode": 4}, {"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 1}, 6)
    assert given_ == {"prefill": 4, "decode": 2}


T = 60.0


@pytest.mark.parametrize(
    ("requests", "decode_by_gpu", "sizes", "correction", "expected"),
    [
        (10, 10_000.0, Sizes(), 1.0, (1, 1)),
        (500, 1_000.0, Sizes(), 1.0, (1, 2)),
        (20, 5_000.0, Sizes(prefill_gpus=2, decode_gpus=4), 1.0, (1, 1)),
        (1600, 40_000.0, Sizes(), 2.5, (2, 1)),
        (1600, 40_000.0, Sizes(), 0.5, (1, 1)),
    ],
)
def test_classic_formula(
    requests: int, decode_by_gpu: float, sizes: Sizes, correction: float, expected: tuple[int, int]
) -> None:
    ahead = Interval(T, requests, 3000.0, 150.0)
    assert replicas(ahead, (40_000.0, decode_by_gpu), correction, sizes) == expected


@pytest.mark.parametrize(
    ("requests", "throughput", "sizes"),
    [
        (5000, (40_000.0, 1_000.0), Sizes(budget=3)),
        (10_000, (10_000.0, 1_000.0), Sizes(prefill_gpus=2, decode_gpus=2, budget=5)),
    ],
)
def test_classic_formula_keeps_its_budget(
    requests: int, throughput: tuple[float, float], sizes: Sizes
) -> None:
    prefill, decode = replicas(Interval(T, requests, 3000.0, 150.0), throughput, 1.0, sizes)
    assert prefill >= 1
    assert decode >= 1
    assert prefill * sizes.prefill_gpus + decode * sizes.decode_gpus <= sizes.budget


def test_classic_formula_keeps_its_least_and_its_correction() -> None:
    assert replicas(Interval(T, 1, 3000.0, 150.0), (40_000.0, 10_000.0), 1.0, Sizes(least=2)) == (2, 2)
    assert itl_target(0.04, 2.0) == 0.02
    assert itl_target(0.04, 0.0) == itl_target(0.04, -1.0) == 0.04
