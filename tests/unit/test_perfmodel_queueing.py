"""Waits: known figures, limits that must hold, and a simulation."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.perfmodel.queueing import (
    Routing,
    crossing,
    erlang_c,
    gamma_tail,
    in_flight,
    service,
    waits,
)
from tests.perf.split import lognormal, queue
from tests.perf.split_engine import at_share


@pytest.mark.parametrize(
    ("servers", "load", "share"),
    [(1, 0.5, 0.5), (2, 0.7, 0.5765), (4, 0.8, 0.5964), (8, 0.9, 0.7015), (16, 0.9, 0.5913)],
)
def test_the_share_that_waits_is_erlangs(servers: int, load: float, share: float) -> None:
    assert erlang_c(servers, load) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize(
    ("shape", "x", "tail"),
    [
        (1.0, 2.0, 0.135335),
        (0.5, 1.0, 0.157299),
        (3.0, 2.0, 0.676676),
        (10.0, 20.0, 0.004995),
        (2.0, 0.0, 1.0),
    ],
)
def test_the_gamma_tail_is_that_of_the_tables(shape: float, x: float, tail: float) -> None:
    assert gamma_tail(shape, x) == pytest.approx(tail, abs=1e-6)


# (workers, load, k2, lowest, highest p99 wait in mean service times), simulated with 2e5 arrivals each.
SIMULATED = [
    (1, 0.8, 0.0, 10.1, 11.4),
    (2, 0.7, 1.0, 7.0, 8.0),
    (4, 0.8, 0.0, 2.4, 2.5),
    (4, 0.8, 1.0, 5.1, 5.3),
    (8, 0.8, 1.0, 2.4, 2.9),
    (8, 0.9, 0.0, 2.5, 2.5),
    (8, 0.9, 1.0, 5.0, 5.6),
]


@pytest.mark.parametrize(("workers", "load", "k2", "low", "high"), SIMULATED)
def test_the_wait_is_within_15_percent_of_what_was_simulated(
    workers: int, load: float, k2: float, low: float, high: float
) -> None:
    found = waits(service(lognormal(k2) if k2 else [1.0]), workers, load * workers)
    assert found is not None
    assert 0.85 * low <= found.quantile(0.99) <= 1.15 * high


# Random routing and each in turn at the same figures: (workers, load, k2, random, each in turn).
OTHERWISE = [(2, 0.7, 1.0, 15.0, 12.6), (4, 0.8, 1.0, 24.0, 15.0), (8, 0.9, 0.0, 23.0, 2.5)]


@pytest.mark.parametrize(("workers", "load", "k2", "anywhere", "in_turn"), OTHERWISE)
def test_routing_that_does_not_look_waits_longer(
    workers: int, load: float, k2: float, anywhere: float, in_turn: float
) -> None:
    times = service(lognormal(k2) if k2 else [1.0])
    by_chance = waits(times, workers, load * workers, "random")
    by_turn = waits(times, workers, load * workers, "round_robin")
    assert by_chance is not None
    assert by_turn is not None
    assert by_chance.quantile(0.99) == pytest.approx(anywhere, rel=0.15)
    assert by_turn.quantile(0.99) == pytest.approx(in_turn, rel=0.15)


def test_a_simulation_of_unequal_prompts_agrees() -> None:
    times = [0.5] * 8 + [3.0] * 2
    case: tuple[int, float, Routing] = (3, 0.7, "least_work")
    seen = at_share(queue(times, case, 60_000, 1), 0.95)
    found = waits(service(times), 3, 0.7 * 3 / service(times).mean)
    assert found is not None
    guess = crossing(lambda t: sum(found.tail(t - one) for one in times) / len(times), 0.05, 1.0)
    assert guess == pytest.approx(seen, rel=0.15)


def test_workers_that_cannot_keep_up_are_told_of() -> None:
    assert waits(service([1.0]), 2, 2.0) is None
    assert waits(service([1.0]), 2, 2.5, "random") is None
    assert in_flight(100.0, 2, lambda count: count * 0.01, 0.95) is None


@pytest.mark.parametrize(("places", "load"), [(1, 0.5), (6, 0.7), (20, 0.9)])
def test_a_wait_for_a_place_is_erlangs(places: int, load: float) -> None:
    """Each of those in flight takes as long whoever else is there: M/M/c."""
    found = in_flight(load * places / 2.0, places, lambda count: 2.0, 0.95)
    assert found is not None
    assert found.full == pytest.approx(erlang_c(places, load))
    rate = 3.0
    wait = found.wait(rate)
    assert wait.delayed * wait.scale_s == pytest.approx(erlang_c(places, load) * load / (1 - load) / rate)


def test_places_that_are_never_taken_are_not_waited_for() -> None:
    few, many = (in_flight(10.0, most, lambda count: 1.0, 0.95) for most in (200, 100_000))
    assert few is not None
    assert many is not None
    assert many.full == 0.0
    assert many.wait(1.0).tail(0.0) == 0.0
    assert many.mean == pytest.approx(few.mean)
    assert many.at == few.at


def test_nobody_waits_where_nobody_comes() -> None:
    found = waits(service([1.0, 2.0]), 3, 0.0)
    assert found is not None
    assert found.quantile(0.999) == 0.0
    assert found.tail(-1.0) == 1.0


LENGTHS = st.lists(st.floats(0.01, 10.0), min_size=1, max_size=20)
ROUTINGS: tuple[Routing, ...] = ("least_work", "round_robin", "random")


@given(LENGTHS, st.integers(1, 16), st.floats(0.05, 0.95), st.sampled_from(ROUTINGS))
@settings(max_examples=200, deadline=None)
def test_a_wait_is_a_distribution(times: list[float], servers: int, load: float, routing: Routing) -> None:
    moments = service(times)
    found = waits(moments, servers, load * servers / moments.mean, routing)
    assert found is not None
    tails = [found.tail(moments.mean * step / 4) for step in range(60)]
    assert all(0.0 <= tail <= 1.0 for tail in tails)
    assert all(after <= before + 1e-9 for before, after in pairwise(tails))
    assert found.quantile(0.99) >= found.quantile(0.5) >= 0.0


@given(LENGTHS, st.integers(1, 12), st.floats(0.1, 0.9))
@settings(max_examples=100, deadline=None)
def test_more_workers_or_fewer_requests_never_wait_longer(
    times: list[float], servers: int, load: float
) -> None:
    moments = service(times)
    rate = load * servers / moments.mean
    before = waits(moments, servers, rate)
    for after in (waits(moments, servers + 1, rate), waits(moments, servers, rate * 0.9)):
        assert before is not None
        assert after is not None
        assert after.quantile(0.95) <= before.quantile(0.95) * 1.01 + 1e-9


@pytest.mark.parametrize(
    ("seats", "share", "allowed"), [(32, 0.95, 0.75), (128, 0.95, 0.86), (64, 0.99, 0.75)]
)
def test_headroom_of_a_batch_whose_steps_are_alike_is_poissons(
    seats: int, share: float, allowed: float
) -> None:
    def fits(mean: float) -> bool:
        found = in_flight(mean / 0.02, seats, lambda count: 0.02, share)
        return found is not None and found.at < seats

    assert fits(allowed * seats * 0.95)
    assert not fits(allowed * seats * 1.05)


def test_many_in_flight_do_not_overflow() -> None:
    found = in_flight(900.0, 1024, lambda count: 1.0, 0.99)
    assert found is not None
    assert found.mean == pytest.approx(900.0, rel=0.01)
    assert found.at == pytest.approx(900 + 2.326 * 30, abs=6)
