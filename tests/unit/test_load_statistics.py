"""Percentiles and their intervals: do they hold what they promise?"""

from __future__ import annotations

import random

import pytest

from dynctl.profiler.load.statistics import Estimate, figure, label, mean_of_slices, proportion, quantile


@pytest.mark.parametrize(("share", "value"), [(0, 1.0), (0.5, 2.5), (0.25, 1.75), (1, 4.0)])
def test_quantiles_lie_on_straight_lines(share: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], share) == value


def test_nothing_has_no_figure() -> None:
    assert figure([]) is None


def test_a_figure_tells_all() -> None:
    found = figure([3.0, 1.0, 2.0], also=0.75)
    assert found is not None
    assert (found.count, found.mean, found.min, found.max, found.std) == (3, 2.0, 1.0, 3.0, 1.0)
    assert set(found.percentiles) == {"p50", "p75", "p90", "p95", "p99"}
    assert label(0.999) == "p99.9"


@pytest.mark.parametrize(("count", "share"), [(40, 0.5), (200, 0.9), (300, 0.95), (3000, 0.95)])
def test_an_interval_holds_the_true_percentile_as_often_as_it_says(count: int, share: float) -> None:
    """Of a skewed law: -ln(1 - share) is the quantile of the exponential."""
    import math

    rng, true, rounds = random.Random(count), -math.log(1 - share), 200
    held = 0
    for _ in range(rounds):
        found = figure([rng.expovariate(1.0) for _ in range(count)], also=share)
        assert found is not None
        one = found.percentiles[label(share)]
        assert one.low is not None
        assert one.high is not None
        held += one.low <= true <= one.high
    assert held / rounds >= 0.90


def test_a_sample_too_small_for_a_percentile_says_so() -> None:
    found = figure([float(n) for n in range(30)])
    assert found is not None
    assert found.percentiles["p50"].low is not None
    assert found.percentiles["p99"].high is None


def test_what_goes_together_widens_the_interval() -> None:
    values = [float(n) for n in range(1000)]
    alone, tied = figure(values), figure(values, independent=50)
    assert alone is not None
    assert tied is not None
    widths = [one.percentiles["p50"].high - one.percentiles["p50"].low for one in (alone, tied)]  # type: ignore[operator]
    assert widths[1] > 3 * widths[0]


def test_a_proportion_of_all_is_not_taken_for_certain() -> None:
    found = proportion(20, 20)
    assert found.value == 1.0
    assert found.high == pytest.approx(1.0)
    assert found.low == pytest.approx(0.839, abs=0.001)  # Wilson: 20 / (20 + 1.96^2)
    assert proportion(0, 0) == Estimate(value=0.0)


def test_the_mean_of_slices_is_students() -> None:
    found = mean_of_slices([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    assert found.value == 5.5
    assert found.high == pytest.approx(5.5 + 2.262 * 3.02765 / 10**0.5, rel=0.01)
    assert mean_of_slices([]) == Estimate(value=0.0)
    assert mean_of_slices([3.0]) == Estimate(value=3.0)


def test_intervals_that_meet_are_not_apart() -> None:
    one = Estimate(value=2, low=1, high=3)
    assert one.apart_from(Estimate(value=5, low=4, high=6))
    assert Estimate(value=5, low=4, high=6).apart_from(one)
    assert not one.apart_from(Estimate(value=3.5, low=3, high=4))
    assert not one.apart_from(Estimate(value=9))
