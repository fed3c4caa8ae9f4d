"""How pressed workers are: all of them, not one; what fewer could bear."""

from __future__ import annotations

import pytest

from dynctl.perfmodel.choice import Sla
from dynctl.planner.capacity import Forecast
from dynctl.planner.load import pressure
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.instances import Role
from tests.unit.planner_rig import LAW, SLA

USUAL = Forecast(rate=5.0, isl=2000.0, osl=200.0)


def seen(role: Role, *workers: WorkerLoad, **more: object) -> Observation:
    ready = int(str(more.pop("ready", len(workers))))
    load = RoleLoad(wanted=ready, ready=ready, workers=workers)
    return Observation(span_s=5.0, arrivals=25, roles={role: load}, **more)  # type: ignore[arg-type]


def worker(**fields: object) -> WorkerLoad:
    return WorkerLoad(id="w", **fields)  # type: ignore[arg-type]


LATE, EASY = worker(prefill_tokens=40_000.0, waiting=20.0), worker(prefill_tokens=100.0)
CROWDED, CALM = worker(running=200.0), worker(running=2.0)


def test_one_hot_worker_is_no_reason_to_grow() -> None:
    assert pressure("prefill", seen("prefill", LATE, LATE), LAW, SLA, USUAL).over
    assert not pressure("prefill", seen("prefill", LATE, EASY), LAW, SLA, USUAL).over
    assert pressure("decode", seen("decode", CROWDED, CROWDED), LAW, SLA, USUAL).over
    assert not pressure("decode", seen("decode", CROWDED, CALM), LAW, SLA, USUAL).over


def test_what_waits_in_frontends_weighs_on_all_workers() -> None:
    found = pressure("prefill", seen("prefill", EASY, EASY, queued=30), LAW, SLA, USUAL)
    assert found.over
    assert "500 ms are asked for" in found.why


def test_decode_is_not_blamed_for_first_tokens_nor_prefill_for_those_between() -> None:
    assert not pressure("decode", seen("decode", CALM, ttft_s=9.0), LAW, SLA, USUAL).over
    assert not pressure("prefill", seen("prefill", EASY, itl_s=9.0), LAW, SLA, USUAL).over


def test_a_full_kv_cache_with_requests_waiting_is_pressure() -> None:
    full = worker(running=5.0, waiting=3.0, kv_usage=0.99)
    found = pressure("decode", seen("decode", full), LAW, SLA, USUAL)
    assert "KV cache of every worker is full" in found.why
    assert not pressure("decode", seen("decode", worker(running=5.0, kv_usage=0.99)), LAW, SLA, USUAL).over


def test_what_users_got_counts_where_something_waits() -> None:
    late = seen("prefill", EASY, EASY, ttft_s=0.9)
    assert "first tokens came after 900 ms" in pressure("prefill", late, LAW, SLA, USUAL).why
    assert not pressure("prefill", seen("prefill", worker(), ttft_s=0.9), LAW, SLA, USUAL).over
    late = seen("prefill", EASY, ttft_s=12.0)
    assert "after 12.0 s" in pressure("prefill", late, None, SLA, None).why


def test_without_costs_it_goes_by_what_users_got() -> None:
    slow = pressure("decode", seen("decode", CALM, CALM, itl_s=0.03), None, SLA, USUAL)
    assert "tokens came 30 ms apart" in slow.why
    fine = seen("decode", CALM, CALM, itl_s=0.005, ttft_s=0.1)
    assert pressure("decode", fine, None, SLA, None).fewest == 1
    assert pressure("decode", seen("decode", CALM, CALM, itl_s=0.015), None, SLA, None).fewest == 2
    calm = (worker(), worker())
    assert pressure("prefill", seen("prefill", *calm, ttft_s=0.1), None, SLA, None).fewest == 1
    assert pressure("prefill", seen("prefill", *calm, ttft_s=0.4), None, SLA, None).fewest == 2
    assert pressure("prefill", seen("prefill", *calm), None, SLA, None).fewest == 1
    assert pressure("prefill", seen("prefill", worker(waiting=1.0), worker()), None, SLA, None).fewest == 2


def test_without_a_level_for_first_tokens_only_a_queue_is_pressure() -> None:
    lazy = Sla(itl_s=0.05)
    assert "4 requests wait" in pressure("prefill", seen("prefill", LATE, queued=4), LAW, lazy, USUAL).why
    assert not pressure("prefill", seen("prefill", LATE), LAW, lazy, USUAL).over
    assert pressure("decode", seen("decode", CROWDED), LAW, Sla(ttft_s=0.5), USUAL).fewest == 1


@pytest.mark.parametrize(
    ("role", "workers", "fewest"),
    [
        ("prefill", (EASY, EASY, EASY), 1),
        ("prefill", (worker(prefill_tokens=5000.0),) * 2, 2),
        ("decode", (CALM,) * 4, 1),
        ("decode", (worker(running=80.0),) * 2, 2),
        ("decode", (worker(running=2.0, kv_usage=0.5),) * 2, 2),
        ("aggregated", (worker(running=2.0, kv_usage=0.2),) * 2, 1),
    ],
)
def test_fewer_only_where_those_left_would_bear_it(
    role: Role, workers: tuple[WorkerLoad, ...], fewest: int
) -> None:
    assert pressure(role, seen(role, *workers), LAW, SLA, USUAL).fewest == fewest


def test_demand_that_would_fill_those_left_keeps_them() -> None:
    busy = Forecast(rate=20.0, isl=2000.0, osl=200.0)
    assert pressure("prefill", seen("prefill", EASY, EASY, EASY), LAW, SLA, busy).fewest == 2


def test_workers_that_say_nothing_keep_all() -> None:
    assert pressure("prefill", seen("prefill", EASY, ready=3), LAW, SLA, USUAL).fewest == 3
    nobody = pressure("prefill", seen("prefill"), LAW, SLA, USUAL)
    assert (nobody.over, nobody.fewest) == (False, 1)
    assert not pressure("decode", seen("decode"), LAW, SLA, USUAL).over


def test_a_level_that_a_request_alone_misses_asks_for_twice_its_time() -> None:
    strict = Sla(ttft_s=0.01, itl_s=0.0001)
    assert not pressure("prefill", seen("prefill", EASY, EASY), LAW, strict, USUAL).over
    assert pressure("prefill", seen("prefill", LATE, LATE), LAW, strict, USUAL).over
    assert not pressure("decode", seen("decode", CALM), LAW, strict, USUAL).over


def test_lengths_that_are_not_known_judge_nothing_by_the_law() -> None:
    assert not pressure("prefill", seen("prefill", EASY), LAW, SLA, None).over
    assert not pressure("decode", seen("decode", CROWDED), LAW, SLA, None).over
