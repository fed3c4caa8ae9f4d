from __future__ import annotations

from pathlib import Path

import pytest

import dynctl.frontend
import dynctl.router
from dynctl.observability.catalogue import FRONTEND, Metric, log_buckets
from dynctl.observability.metrics import Metrics

DYNAMO_BUCKETS = {
    "request_duration_seconds": (0, 2, 4, 8, 16, 32, 64, 130, 260, 510),
    "time_to_first_token_seconds": (
        *(0, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47),
        *(1, 2.2, 4.7, 10, 22, 48, 100, 220, 480),
    ),
    "input_sequence_tokens": (0, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000),
    "output_sequence_tokens": (0, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000),
    "tokenizer_latency_ms": (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
}
"""As its exposition shows them."""


def test_buckets_are_dynamos() -> None:
    found = {metric.name: metric.buckets for metric in FRONTEND}
    assert {name: found[name] for name in DYNAMO_BUCKETS} == DYNAMO_BUCKETS
    ttft = log_buckets(0.001, 480, 18)
    assert list(ttft) == sorted(set(ttft))


def test_catalogue_names_are_unique_and_follow_the_conventions() -> None:
    names = [metric.name for metric in FRONTEND]
    assert len(names) == len(set(names))
    for metric in FRONTEND:
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert metric.help.endswith(".")


def test_every_row_is_set_somewhere() -> None:
    rooms = (Path(dynctl.frontend.__file__).parent, Path(dynctl.router.__file__).parent)
    code = "".join(path.read_text() for room in rooms for path in room.rglob("*.py"))
    assert [metric.name for metric in FRONTEND if f'"{metric.name}"' not in code] == []


def test_the_same_labels_are_the_same_series() -> None:
    metrics = Metrics()
    metrics.counter("retries_total", reason="peer_lost").inc()
    metrics.counter("retries_total", reason="peer_lost").inc(2)
    assert b'dynctl_frontend_retries_total{reason="peer_lost"} 3.0' in metrics.render()


def test_unknown_names_and_labels_are_refused() -> None:
    metrics = Metrics()
    with pytest.raises(KeyError):
        metrics.counter("no_such_total")
    with pytest.raises(KeyError):
        metrics.counter("retries_total")
    with pytest.raises(KeyError):
        metrics.counter("retries_total", cause="x")


def test_histogram_text_is_cumulated_and_counts_repeats() -> None:
    metrics = Metrics((Metric("h", "histogram", "Help.", ("model",), (1.0, 2.0)),), prefix="p")
    histogram = metrics.histogram("h", model="m")
    histogram.observe(1.0)
    histogram.observe(1.5, times=3)
    histogram.observe(9.0)
    text = metrics.render().decode()
    assert 'p_frontend_h_bucket{le="1.0",model="m"} 1.0' in text
    assert 'p_frontend_h_bucket{le="2.0",model="m"} 4.0' in text
    assert 'p_frontend_h_bucket{le="+Inf",model="m"} 5.0' in text
    assert 'p_frontend_h_count{model="m"} 5.0' in text
    assert 'p_frontend_h_sum{model="m"} 14.5' in text


def test_gauges_are_set_or_read_at_the_time_of_asking() -> None:
    metrics = Metrics()
    inflight = metrics.gauge("inflight_requests", model="m")
    inflight.set(5)
    inflight.dec()
    metrics.gauge("connections").read = lambda: 7.0
    text = metrics.render()
    assert b'dynctl_frontend_inflight_requests{model="m"} 4.0' in text
    assert b"dynctl_frontend_connections 7.0" in text


def test_series_of_a_worker_that_left_are_dropped() -> None:
    metrics = Metrics()
    metrics.gauge("router_kv_blocks", worker="decode-0", rank="0").set(1)
    metrics.gauge("router_kv_blocks", worker="decode-1", rank="0").set(1)
    metrics.drop("router_kv_blocks", worker="decode-0")
    text = metrics.render()
    assert b"decode-0" not in text
    assert b"decode-1" in text


def test_metrics_without_a_series_are_not_shown() -> None:
    assert Metrics().render() == b""
