"""One limit for all of a verb: connecting and looking count, too."""

from __future__ import annotations

import asyncio

import pytest

from dynctl.cli.limit import LEAST_S, Limit
from dynctl.errors import NotReady


async def test_a_step_that_outlasts_the_limit_is_ended_and_told() -> None:
    limit = Limit.of(0.05)
    with pytest.raises(NotReady, match=r"'demo' was not up within 0.05 s: hosts were being connected to"):
        async with limit.during("demo", "hosts were being connected to"):
            await asyncio.sleep(3600)
    with pytest.raises(NotReady, match="looked at"):
        async with limit.during("demo", "hosts were being looked at"):  # the limit is for all steps together
            await asyncio.sleep(3600)


async def test_what_is_left_is_for_the_next_step_and_another_time_out_is_its_own() -> None:
    limit = Limit.of(1000.0)
    with pytest.raises(TimeoutError):
        async with limit.during("demo", "-"):
            raise TimeoutError
    assert 0 < (limit.left_s() or 0) <= 1000
    assert limit.options()[0] == "--timeout"
    assert Limit.of(0.0).left_s() == LEAST_S


async def test_without_a_limit_nothing_is_ended() -> None:
    async with Limit.of(None).during("demo", "-"):
        await asyncio.sleep(0)
    assert Limit.of(None).options() == []
