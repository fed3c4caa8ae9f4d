"""Many steps at once take as long as one by one, and are counted back exactly."""

from __future__ import annotations

from random import Random

import pytest

from dynctl.perfmodel.profile import DEFAULT
from dynctl.simulator.pace import Pace


@pytest.mark.parametrize(
    ("batch", "context", "steps"), [(1, 0, 1), (3, 12000, 5000), (70, 280_000, 700), (300, 900, 20_000)]
)
def test_a_jump_takes_the_sum_of_its_steps(batch: int, context: int, steps: int) -> None:
    one_by_one = sum(DEFAULT.decode_s(batch, context / batch + done) for done in range(steps))
    assert Pace(DEFAULT).alike_s(batch, context, steps) == pytest.approx(one_by_one, rel=1e-9)


def test_as_many_steps_are_over_as_fit_into_the_time() -> None:
    pace, rng = Pace(DEFAULT), Random(4)
    for _ in range(200):
        batch, most = rng.randrange(1, 200), rng.randrange(1, 3000)
        context = batch * rng.randrange(1, 30_000)
        elapsed_s = rng.random() * pace.alike_s(batch, context, most)
        over = pace.done(batch, context, most, elapsed_s)
        assert pace.alike_s(batch, context, over) <= elapsed_s
        assert over == most or pace.alike_s(batch, context, over + 1) > elapsed_s
    assert pace.done(8, 800, 50, 1e6) == 50
