"""From frontends' figures to an observation: arrivals, not completions; nothing counted twice."""

from __future__ import annotations

import pytest

from dynctl.deploy.figures import Look, parse
from dynctl.observability.metrics import Metrics
from dynctl.planner.figures import Seats, observation
from dynctl.planner.observe import RoleLoad

SEATS = {"aggregated": Seats(RoleLoad(wanted=2, ready=1), ("aggregated-0",))}


def look(at: float, *frontends: Metrics) -> Look:
    return Look(at, {f"frontend-{i}": parse(one.render().decode()) for i, one in enumerate(frontends)})


def started(metrics: Metrics, count: int, endpoint: str = "chat_completions") -> None:
    metrics.counter("requests_started_total", model="m", endpoint=endpoint, request_type="stream").inc(count)


def test_arrivals_are_counted_whatever_became_of_them() -> None:
    one, two = Metrics(), Metrics()
    before = look(10.0, one, two)
    started(one, 7)
    started(two, 3)
    started(two, 100, "embeddings")
    found = observation(before, look(15.0, one, two), SEATS, 0.95)  # type: ignore[arg-type]
    assert (found.arrivals, found.span_s) == (10, 5.0)
    assert (found.isl, found.osl, found.ttft_s, found.hit_rate, found.isl_cv) == (None,) * 5


def test_lengths_times_and_queues_are_of_the_span() -> None:
    metrics = Metrics()
    prompts = metrics.histogram("input_sequence_tokens", model="m")
    prompts.observe(9000.0, 5)
    before = look(0.0, metrics)
    prompts.observe(100.0, 5)
    prompts.observe(3000.0, 5)
    metrics.histogram("output_sequence_tokens", model="m").observe(200.0, 4)
    metrics.histogram("time_to_first_token_seconds", model="m").observe(0.4, 10)
    metrics.histogram("inter_token_latency_seconds", model="m").observe(0.01, 10)
    metrics.histogram("time_per_output_token_seconds", model="m").observe(0.012, 4)
    queue = {"model": "m", "worker_type": "aggregated", "policy_class": "fcfs"}
    metrics.gauge("router_queue_pending_requests", **queue).set(3)
    metrics.gauge("model_total_kv_blocks", model="m").set(100)
    metrics.gauge("model_kv_cache_block_size", model="m").set(16)
    found = observation(before, look(5.0, metrics), SEATS, 0.9)  # type: ignore[arg-type]
    assert (found.isl, found.osl, found.queued, found.kv_tokens) == (1550.0, 200.0, 3, 1600)
    assert found.ttft_mean_s == pytest.approx(0.4)
    assert found.itl_mean_s == pytest.approx(0.01)
    assert found.ttft_s is not None
    assert 0.2 < found.ttft_s < 0.5
    assert found.itl_s == pytest.approx(0.012, rel=0.06)
    assert found.isl_cv is not None
    assert 0.7 < found.isl_cv < 1.1


def test_what_a_worker_says_is_summed_over_its_ranks_but_not_over_frontends() -> None:
    told = []
    for _ in range(2):
        metrics = Metrics()
        for rank in ("0", "1"):
            labels = {"worker": "aggregated-0", "rank": rank}
            metrics.gauge("router_worker_running", **labels).set(4)
            metrics.gauge("router_worker_waiting", **labels).set(1)
            metrics.gauge("router_worker_kv_usage", **labels).set(0.5)
            metrics.counter("router_worker_prefix_queries_total", **labels).set(100)
            metrics.counter("router_worker_prefix_hits_total", **labels).set(25)
            ids = {"worker_id": "aggregated-0", "dp_rank": rank, "worker_type": "aggregated"}
            metrics.gauge("worker_active_prefill_tokens", **ids).set(1000)
        told.append(metrics)
    found = observation(look(0.0, Metrics()), look(5.0, *told), SEATS, 0.95)  # type: ignore[arg-type]
    load = found.roles["aggregated"]
    assert (load.wanted, load.ready) == (2, 1)
    (worker,) = load.workers
    assert (worker.running, worker.waiting, worker.kv_usage, worker.prefill_tokens) == (8.0, 2.0, 0.5, 2000.0)
    assert found.hit_rate == 0.25


def test_a_worker_nobody_has_heard_of_is_idle_and_of_unknown_kv() -> None:
    found = observation(look(0.0, Metrics()), look(5.0, Metrics()), SEATS, 0.95)  # type: ignore[arg-type]
    (worker,) = found.roles["aggregated"].workers
    assert (worker.running, worker.kv_usage) == (0.0, None)


def test_prompts_beyond_the_last_bucket_have_a_spread_too() -> None:
    metrics = Metrics()
    before = look(0.0, metrics)
    prompts = metrics.histogram("input_sequence_tokens", model="m")
    prompts.observe(500_000.0, 2)
    prompts.observe(10.0, 2)
    found = observation(before, look(5.0, metrics), SEATS, 0.95)  # type: ignore[arg-type]
    assert found.isl_cv is not None
    assert found.isl_cv > 0.9


def test_a_pause_in_every_answer_is_not_taken_for_slow_answers() -> None:
    metrics = Metrics()
    before = look(0.0, metrics)
    gaps = metrics.histogram("inter_token_latency_seconds", model="m")
    gaps.observe(0.005, 900)
    gaps.observe(0.1, 100)  # a prompt was read in between
    metrics.histogram("time_per_output_token_seconds", model="m").observe(0.0145, 20)
    found = observation(before, look(5.0, metrics), SEATS, 0.95)  # type: ignore[arg-type]
    assert found.itl_s == pytest.approx(0.0145, rel=0.06)
    assert found.itl_mean_s == pytest.approx(0.0145)


@pytest.mark.parametrize("level_s", [0.005, 0.015, 0.02, 0.03, 0.05, 0.1, 0.3])
def test_answers_a_tenth_within_and_beyond_a_level_are_told_apart(level_s: float) -> None:
    told = []
    for times in (0.9, 1.1):
        metrics = Metrics()
        before = look(0.0, metrics)
        for i in range(100):
            value_s = level_s * times * (0.8 + 0.2 * i / 94)
            metrics.histogram("time_per_output_token_seconds", model="m").observe(value_s)
        found = observation(before, look(5.0, metrics), SEATS, 0.95)  # type: ignore[arg-type]
        told.append(found.itl_s or 0.0)
    assert told[0] < level_s < told[1]
