"""Forecasts: unit-free, never below zero, never without end, whatever the past looks like."""

from __future__ import annotations

import math
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.planner.config import Predictor
from dynctl.planner.predict import predict

ALL: tuple[Predictor, ...] = get_args(Predictor)
ANY = st.lists(st.floats(min_value=-1e6, max_value=1e9) | st.just(math.nan) | st.just(math.inf), max_size=40)


@given(ANY, st.sampled_from(ALL), st.integers(1, 8), st.integers(0, 30))
def test_any_past_gives_forecasts_that_are_numbers(
    past: list[float], name: Predictor, steps: int, season: int
) -> None:
    made = predict(name, past, steps, season)
    assert len(made) == steps
    assert all(math.isfinite(value) and value >= 0.0 for value in made)


@pytest.mark.parametrize("name", ALL)
def test_a_constant_past_stays_constant(name: Predictor) -> None:
    assert predict(name, [12.0] * 30, 4, 10) == pytest.approx([12.0] * 4)


@pytest.mark.parametrize("name", ALL)
def test_nothing_seen_is_nothing_forecast(name: Predictor) -> None:
    assert predict(name, [], 2) == [0.0, 0.0]
    assert predict(name, [0.0, 0.0, math.nan], 2) == [0.0, 0.0]


@pytest.mark.parametrize("name", ALL)
def test_a_past_that_is_too_short_gives_its_last_value(name: Predictor) -> None:
    assert predict(name, [0.0, 0.0, 3.0, 5.0], 2, 10) == [5.0, 5.0]


@pytest.mark.parametrize("name", ["arima", "kalman"])
def test_a_trend_is_prolonged(name: Predictor) -> None:
    made = predict(name, [10.0 + 2.0 * i for i in range(40)], 3)
    assert made == pytest.approx([90.0, 92.0, 94.0], rel=0.03)


def test_a_wave_is_followed_round_its_turns() -> None:
    wave = [10.0 + 7.0 * math.sin(2.0 * math.pi * i / 20.0) for i in range(80)]
    missed = [predict("kalman", wave[:end], 2)[1] - wave[end + 1] for end in range(30, 78)]
    held = [wave[end - 1] - wave[end + 1] for end in range(30, 78)]
    assert math.fsum(one * one for one in missed) < math.fsum(one * one for one in held)


def test_a_trend_that_turns_is_not_followed_late() -> None:
    """A wave of twenty intervals: with a trend that changes slowly, forecasts of it miss by 2.9 and more."""
    rng = random.Random(2)
    wave = [10.0 + 7.0 * math.sin(2.0 * math.pi * i / 20.0) + rng.gauss(0.0, 0.4) for i in range(60)]
    missed = [predict("kalman", wave[:end], 2)[1] - wave[end + 1] for end in range(20, 58)]
    assert math.sqrt(math.fsum(one * one for one in missed) / len(missed)) < 2.4


@pytest.mark.parametrize("name", ["arima", "kalman"])
def test_a_trend_is_not_prolonged_without_end_or_below_zero(name: Predictor) -> None:
    assert max(predict(name, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], 500)) <= 4.0 * 32.0
    assert min(predict(name, [50.0 - 5.0 * i for i in range(10)], 50)) == 0.0


@pytest.mark.parametrize("name", ["moving_average", "kalman"])
def test_noise_is_smoothed(name: Predictor) -> None:
    rng, missed = random.Random(3), []
    series = [rng.gauss(100.0, 20.0) for _ in range(200)]
    for end in range(50, 200):
        missed.append(abs(predict(name, series[:end], 1)[0] - 100.0))
    assert sum(missed) / len(missed) < 14.0


def test_kalman_does_not_mind_the_unit() -> None:
    series = [3.0, 4.0, 6.0, 5.0, 7.0, 9.0, 8.0]
    large = predict("kalman", [1000.0 * value for value in series], 2)
    assert large == pytest.approx([1000.0 * value for value in predict("kalman", series, 2)])


def test_arima_follows_a_pattern_in_the_differences() -> None:
    series = [100.0 + (10.0 if i % 2 else -10.0) for i in range(40)]
    made = predict("arima", series, 2)
    assert made[0] < made[1]
    assert series[-1] > series[-2]


def test_arima_that_would_swing_ever_wider_is_drawn_in() -> None:
    series = [100.0 + (-1.6) ** i for i in range(12)]
    assert max(predict("arima", series, 30)) < 2.0 * max(series)


def test_a_season_repeats_itself_times_what_there_is_more_of_now() -> None:
    day = [10.0, 20.0, 40.0, 20.0]
    assert predict("seasonal", [*day, *day], 4, 4) == day
    assert predict("seasonal", [*day, *(2.0 * value for value in day)], 2, 4) == [40.0, 80.0]


def test_a_season_after_nothing_is_as_it_is_now() -> None:
    assert predict("seasonal", [5.0, 6.0], 2, 0) == [6.0, 6.0]
