"""Costs learnt from what was seen: lines through noise, refused where they would mislead."""

from __future__ import annotations

import random

import pytest

from dynctl.perfmodel.profile import parse_profile
from dynctl.planner.regress import Sample, fit_decode, fit_prefill, profile_of
from tests.unit.planner_rig import LIMITS


def prefill_sample(points: list[tuple[float, float]]) -> Sample:
    sample = Sample(1)
    for tokens, seconds in points:
        sample.add((tokens,), seconds)
    return sample


def decode_sample(points: list[tuple[float, float, float]]) -> Sample:
    sample = Sample(2)
    for count, tokens, seconds in points:
        sample.add((count, tokens), seconds)
    return sample


def test_a_prefill_line_is_found_through_noise() -> None:
    rng = random.Random(1)
    sizes = [rng.uniform(100, 8000) for _ in range(200)]
    found = fit_prefill(prefill_sample([(x, (0.01 + 3e-5 * x) * rng.uniform(0.95, 1.05)) for x in sizes]))
    assert found is not None
    assert found[1] == pytest.approx(3e-5, rel=0.1)


def test_a_decode_plane_is_found_through_noise() -> None:
    rng = random.Random(2)
    rows = [(rng.uniform(1, 64), rng.uniform(1e3, 2e5)) for _ in range(300)]
    points = [(n, kv, (0.01 + 1e-4 * n + 5e-8 * kv) * rng.uniform(0.98, 1.02)) for n, kv in rows]
    found = fit_decode(decode_sample(points))
    assert found is not None
    assert found == pytest.approx((0.01, 1e-4, 5e-8), rel=0.25)
    profile = profile_of((0.004, 3e-5), found, LIMITS)
    assert profile.decode_s(32, 3000) == pytest.approx(0.01 + 1e-4 * 32 + 5e-8 * 32 * 3000, rel=0.1)
    assert profile.prefill_s(0, 1000) == pytest.approx(0.03)


def test_what_is_learnt_is_a_profile() -> None:
    import msgspec

    made = profile_of(None, None, None)
    assert parse_profile(msgspec.json.encode(made), "here") == made
    assert made.transfer_s(1000) == 0.0


@pytest.mark.parametrize(
    "points",
    [
        [(1000.0, 0.1)] * 4,
        [(1000.0 + i, 0.5 - 0.0004 * (1000.0 + 100 * i) / 2) for i in range(0, 12, 2)],
        [(0.0, 0.1)] * 6,
        [(1000.0 * i, 0.5 / i) for i in range(1, 9)],
    ],
)
def test_a_prefill_line_that_misleads_is_refused(points: list[tuple[float, float]]) -> None:
    found = fit_prefill(prefill_sample(points))
    assert found is None or found[1] > 0.0


def test_one_length_of_prompts_gives_its_time_by_the_token() -> None:
    assert fit_prefill(prefill_sample([(1000.0, 0.1)] * 6)) == pytest.approx((0.0, 1e-4))


def test_a_line_from_below_zero_goes_through_it() -> None:
    found = fit_prefill(prefill_sample([(1000.0 * i, 1e-4 * 1000.0 * i - 0.05) for i in range(1, 9)]))
    assert found is not None
    assert found[0] == 0.0
    assert found[1] > 0.0


def test_a_decode_plane_that_falls_with_tokens_is_refused() -> None:
    rng = random.Random(3)
    rows = [(rng.uniform(1, 64), rng.uniform(1e3, 2e5)) for _ in range(60)]
    assert fit_decode(decode_sample([(n, kv, 0.1 + 1e-4 * n - 4e-7 * kv) for n, kv in rows])) is None
    assert fit_decode(decode_sample([(1.0, 100.0, 0.01)] * 3)) is None


def test_a_decode_plane_that_falls_with_requests_goes_by_tokens() -> None:
    rng = random.Random(4)
    rows = [(rng.uniform(1, 64), rng.uniform(1e5, 2e5)) for _ in range(60)]
    found = fit_decode(decode_sample([(n, kv, 0.02 - 1e-4 * n + 1e-6 * kv) for n, kv in rows]))
    assert found is not None
    assert found[1] == 0.0
    assert found[2] > 0.0


def test_requests_and_tokens_that_go_together_are_not_told_apart() -> None:
    found = fit_decode(decode_sample([(float(n), 2100.0 * n, 0.01 + 1e-4 * n) for n in range(1, 20)]))
    assert found == pytest.approx((0.01, 1e-4, 0.0))
    assert fit_decode(decode_sample([(float(n), 2100.0 * n, 0.1 - 1e-3 * n) for n in range(1, 20)])) is None
    assert fit_decode(decode_sample([(4.0, 8000.0, 0.01)] * 8)) == pytest.approx((0.01, 0.0, 0.0))


def test_a_long_quiet_time_does_not_push_out_what_was_seen_under_load() -> None:
    sample = prefill_sample([(8000.0, 0.5)] * 3)
    for _ in range(500):
        sample.add((100.0,), 0.01)
    assert len(sample.points) == 64
    assert sum(at == (8000.0,) for at, _ in sample.points) == 3


def test_what_is_no_sample_is_left_out() -> None:
    assert prefill_sample([(100.0, 0.0), (-1.0, 0.1)]).points == []
