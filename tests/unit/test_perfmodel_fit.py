"""Few measured points and an estimate make numbers that say more than either."""

from __future__ import annotations

import pytest

from dynctl.perfmodel.fit import (
    decode_row,
    plain,
    posterior,
    prefill_row,
    prior_of,
    refitted,
    scaled,
)
from dynctl.perfmodel.profile import DEFAULT

LAW = (0.01, 2e-4, 3e-7)


def step_s(batch: float, context: float) -> float:
    return LAW[0] + LAW[1] * batch + LAW[2] * batch * context


def test_numbers_of_a_law_are_found_again() -> None:
    rows = [decode_row(b, c, step_s(b, c)) for b, c in ((1, 100), (50, 1000), (50, 4000), (200, 500))]
    assert plain(rows) == pytest.approx(LAW, rel=1e-4)


def test_what_was_measured_goes_before_what_was_estimated() -> None:
    rows = [decode_row(b, c, 2.0 * step_s(b, c)) for b, c in ((1, 1000), (100, 1000), (100, 500), (40, 1000))]
    found = posterior(rows, LAW)
    for (_, batch, tokens), seconds in rows:
        assert found[0] + found[1] * batch + found[2] * tokens == pytest.approx(seconds, rel=0.02)


def test_what_no_point_tells_stays_as_estimated() -> None:
    assert posterior([], LAW) == LAW
    one = posterior([prefill_row(1000, LAW[0] + LAW[1] * 1000 + LAW[2] * 1e6)], LAW)
    assert one == pytest.approx(LAW, rel=1e-3)


def test_no_number_is_negative_whatever_noise_there_is() -> None:
    rows = [prefill_row(100, 0.05), prefill_row(1000, 0.04), prefill_row(4000, 0.5)]
    assert min(plain(rows)) >= 0.0


def test_a_prompt_read_in_several_steps_pays_the_fixed_time_of_each() -> None:
    rows = [prefill_row(n, steps * 0.05 + n * 1e-4, steps) for n, steps in ((100, 1), (8000, 1), (16000, 2))]
    assert plain(rows)[0] == pytest.approx(0.05, rel=1e-3)


def test_a_refitted_profile_has_the_estimates_limits_and_the_measured_times() -> None:
    rows = [decode_row(b, 1000, 0.02 + b * 1e-3) for b in (1, 16, 64)]
    reading = [prefill_row(n, 0.1 + n * 1e-3) for n in (100, 1000, 2000)]
    found = refitted(DEFAULT, reading, rows, spread=100.0)
    assert found.source == "measured"
    assert found.transfer == DEFAULT.transfer
    assert found.decode_s(32, 1000) == pytest.approx(0.052, rel=0.05)
    assert found.prefill.seconds[0] + found.prefill_s(0, 1500) == pytest.approx(1.6, rel=0.05)


def test_half_the_measuring_leaves_the_other_half_and_its_source_alone() -> None:
    found = refitted(DEFAULT, [], [decode_row(1, 100, 0.5)])
    assert (found.prefill, found.source) == (DEFAULT.prefill, DEFAULT.source)


def test_an_estimate_as_numbers_is_near_the_estimate() -> None:
    a, b, c = prior_of(DEFAULT)[1]
    for batch, context in ((1, 4096), (64, 4096), (256, 4096)):
        assert a + b * batch + c * batch * context == pytest.approx(
            DEFAULT.decode_s(batch, context), rel=0.15
        )


def test_a_scaled_profile_takes_so_much_longer() -> None:
    twice = scaled(DEFAULT, prefill=2.0, decode=3.0)
    assert twice.prefill_s(0, 500) == pytest.approx(2.0 * DEFAULT.prefill_s(0, 500))
    assert twice.decode_s(9, 700) == pytest.approx(3.0 * DEFAULT.decode_s(9, 700))
