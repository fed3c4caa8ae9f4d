"""Whom a client may ask for: a worker that is away is not its mistake, a name there never was is."""

from __future__ import annotations

import pytest

from dynctl.errors import Rejected, RequestError
from dynctl.router.request import RouteRequest
from tests.unit.router_rig import member, routing


async def test_worker_asked_for_while_it_is_restarted_is_no_mistake_of_the_client() -> None:
    async with routing(mode="least_loaded") as router:
        asked = RouteRequest("aggregated", pinned="aggregated-0")
        router.members_changed([member(), member("aggregated-1")], [])
        router.members_changed([], ["aggregated-0"])
        with pytest.raises(Rejected, match="the worker asked for, aggregated-0, is gone"):
            router.choose(asked)
        router.members_changed([member("decode-0")], [])
        with pytest.raises(RequestError, match=r"no worker .aggregated-0. of role decode"):
            router.choose(RouteRequest("decode", pinned="aggregated-0"))
        router.members_changed([member(incarnation=2)], [])
        assert router.choose(asked).instance.id == "aggregated-0"


async def test_worker_or_rank_asked_for_before_any_is_there_is_no_mistake_of_the_client() -> None:
    async with routing(mode="least_loaded") as router:
        for asked in ({"pinned": "aggregated-0"}, {"pinned_rank": 0}):
            with pytest.raises(Rejected, match="no worker of role aggregated is registered"):
                router.choose(RouteRequest("aggregated", **asked))
