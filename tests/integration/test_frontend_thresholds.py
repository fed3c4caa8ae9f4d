"""`/busy_threshold`: who may change it, and that a change takes effect at once."""

from __future__ import annotations

import hashlib
import json

import pytest

from dynctl.frontend.keys import is_loopback
from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.specs import ApiKeySpec, QueueSpec, RouterSpec
from tests.integration.frontend_harness import Engine, Front, error_of, frontend, make_spec

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 3}
NO_QUEUE = RouterSpec(mode="round_robin", queue=QueueSpec(limit=0))


def fill(front: Front) -> None:
    report = LoadReport("aggregated-0", 1, 0, running=1, waiting=0, kv_usage=0.5, kv_blocks=100)
    front.core.router.on_load(report)


async def test_a_change_takes_effect_at_once_and_can_be_taken_back() -> None:
    async with frontend(make_spec(router=NO_QUEUE), aggregated=[Engine()]) as front:
        fill(front)
        assert (await front.post("/v1/completions", COMPLETION)).status == 200
        changed = await front.post("/busy_threshold", {"model": "m", "active_decode_blocks_threshold": 0.4})
        assert json.loads(changed.body) == {
            "model": "m",
            "active_decode_blocks_threshold": 0.4,
            "active_prefill_tokens_threshold": None,
            "active_prefill_tokens_threshold_frac": None,
            "frontend": "frontend-0",
        }
        assert (await front.post("/v1/completions", COMPLETION)).status == 429
        shown = json.loads((await front.call("GET", "/busy_threshold")).body)
        assert shown == {"thresholds": [json.loads(changed.body)]}
        await front.post("/busy_threshold", {"active_decode_blocks_threshold": None})
        assert (await front.post("/v1/completions", COMPLETION)).status == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        ({"active_decode_blocks_threshold": 1.5}, 400),
        ({"active_prefill_tokens_threshold": -1}, 400),
        ({"decode_blocks": 0.5}, 400),
        ({"model": "other"}, 404),
    ],
)
async def test_what_is_no_change_changes_nothing(body: object, status: int) -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        before = (await front.call("GET", "/busy_threshold")).body
        assert (await front.post("/busy_threshold", body)).status == status
        assert (await front.call("GET", "/busy_threshold")).body == before
        assert (await front.call("DELETE", "/busy_threshold")).status == 405


async def test_clients_keys_may_not_change_it_and_an_admins_may() -> None:
    keys = [
        ApiKeySpec(name="team", sha256=hashlib.sha256(b"team").hexdigest()),
        ApiKeySpec(name="ops", sha256=hashlib.sha256(b"ops").hexdigest(), admin=True),
    ]
    change = {"active_prefill_tokens_threshold": 5}
    async with frontend(make_spec(api_keys=keys), aggregated=[Engine()]) as front:
        assert (await front.post("/busy_threshold", change)).status == 401
        refused = await front.post("/busy_threshold", change, {"authorization": "Bearer team"})
        assert (refused.status, error_of(refused)["code"]) == (403, "forbidden")
        assert (await front.post("/busy_threshold", change, {"authorization": "Bearer ops"})).status == 200


async def test_a_proxy_on_this_machine_is_not_taken_for_its_clients() -> None:
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        forwarded = {"x-forwarded-for": "203.0.113.7"}
        page = {"origin": "http://elsewhere.example", "content-type": "text/plain"}
        for headers in (forwarded, page):
            assert (await front.post("/busy_threshold", {}, headers)).status == 403
        assert (await front.post("/busy_threshold", {})).status == 200


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("127.0.0.1:5", True),
        ("::1:5", True),
        ("::ffff:127.0.0.1:5", True),
        ("10.0.0.1:5", False),
        ("", False),
        ("x:1", False),
    ],
)
def test_this_machine_is_known_by_its_address(peer: str, here: bool) -> None:
    assert is_loopback(peer) is here
