"""Figures between two looks at frontends' metrics: nothing made up, nothing counted twice."""

from __future__ import annotations

import math

import pytest

from dynctl.cli.top_view import duration, shown
from dynctl.deploy.figures import Figures, Look, WorkerFigures, figures, parse, quantile
from dynctl.protocol.deployment import DeploymentView, ProcessView, SeatState

SCRAPE = """\
# HELP x y
{p}_frontend_requests_total{{endpoint="c",error_type="",status="success"}} {ok}
{p}_frontend_requests_total{{endpoint="c",error_type="engine",status="error"}} {bad}
{p}_frontend_output_tokens_total{{model="a\\"b"}} {tokens}
{p}_frontend_inflight_requests{{model="m"}} 3.0
{p}_frontend_time_to_first_token_seconds_bucket{{le="0.1",model="m"}} {fast}
{p}_frontend_time_to_first_token_seconds_bucket{{le="0.2",model="m"}} {ok}
{p}_frontend_time_to_first_token_seconds_bucket{{le="+Inf",model="m"}} {ok}
{p}_frontend_router_worker_running{{rank="0",worker="decode-0"}} 2.0
{p}_frontend_router_worker_running{{rank="1",worker="decode-0"}} 1.0
{p}_frontend_router_worker_waiting{{rank="0",worker="decode-0"}} 4.0
{p}_frontend_router_worker_kv_usage{{rank="0",worker="decode-0"}} 0.25
{p}_frontend_router_worker_kv_usage{{rank="1",worker="decode-0"}} 0.75
{p}_frontend_router_worker_prefix_queries_total{{rank="0",worker="decode-0"}} {tokens}
{p}_frontend_router_worker_prefix_hits_total{{rank="0",worker="decode-0"}} {ok}
other_metric 7
"""


def look(at: float, prefix: str = "dynctl", **frontends: tuple[int, int, int, int]) -> Look:
    """(ok, bad, tokens, fast) of each frontend."""
    made = {
        name: parse(SCRAPE.format(p=prefix, ok=ok, bad=bad, tokens=tokens, fast=fast))
        for name, (ok, bad, tokens, fast) in frontends.items()
    }
    return Look(at, made)


@pytest.mark.parametrize("prefix", ["dynctl", "dynamo"])
def test_rates_are_of_the_interval_and_of_all_frontends(prefix: str) -> None:
    before = look(10.0, prefix, a=(100, 0, 1000, 100), b=(50, 0, 500, 50))
    after = look(12.0, prefix, a=(110, 2, 1100, 105), b=(60, 0, 600, 55))
    found = figures(before, after)
    assert (found.requests, found.errors, found.tokens, found.inflight) == (11.0, 1.0, 100.0, 6)
    assert list(found.ttft) == pytest.approx([0.1, 0.19])
    assert found.itl == (None, None)


def test_what_an_engine_says_of_itself_is_not_added_up_over_frontends() -> None:
    before = look(0.0, a=(0, 0, 0, 0), b=(0, 0, 0, 0))
    found = figures(before, look(1.0, a=(10, 0, 40, 0), b=(10, 0, 40, 0)))
    assert found.workers == {"decode-0": WorkerFigures(running=3, waiting=4, kv_usage=0.5, hit_rate=0.25)}
    assert found.hit_rate == 0.25


def test_a_frontend_started_anew_makes_no_negative_rate() -> None:
    found = figures(look(0.0, a=(1000, 0, 9000, 0)), look(1.0, a=(5, 0, 10, 0)))
    assert (found.requests, found.tokens) == (5.0, 10.0)


def test_without_requests_there_is_no_latency_and_without_frontends_nothing_at_all() -> None:
    still = look(0.0, a=(5, 0, 5, 5))
    assert figures(still, Look(1.0, still.series)).ttft == (None, None)
    assert figures(Look(0.0, {}), Look(1.0, {})) == Figures()


def test_a_quantile_beyond_the_last_bound_is_that_bound() -> None:
    assert quantile([(1.0, 1.0), (2.0, 1.0), (math.inf, 10.0)], 0.95) == 2.0
    assert quantile([(0.0, 0.0), (1.0, 4.0)], 0.5) == 0.5
    assert quantile([], 0.5) is None


def row(seat: str, state: SeatState = "ready", **fields: object) -> ProcessView:
    role, _, index = seat.partition("-")
    return ProcessView(
        id=seat,
        role=role,
        index=int(index),
        instance=seat,
        node="a-node-with-quite-a-long-name.example",
        state=state,
        ready=state == "ready",
        pid=7,
        engine_pid=8,
        restarts=0,
        url="http://127.0.0.1:8000",
        incarnation=1,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_fits_the_terminal(width: int) -> None:
    view = DeploymentView(
        name="llama",
        run_id="r",
        run_dir="d",
        url="http://127.0.0.1:8000",
        phase="degraded",
        reason="decode-1 will be restarted: " + "why " * 40,
        controller_pid=1,
        wanted={"decode": 2},
        processes=[
            row("frontend-0"),
            row("decode-0", gpus=[0, 1, 2, 3, 6]),
            row("decode-1", "backoff", gpus=[7]),
            row("decode-2", surge=True),
        ],
        changing="decode-1 is starting, " * 10,
        locked="me@host: " + "because " * 20,
    )
    told = WorkerFigures(running=1234, waiting=56, kv_usage=0.93, hit_rate=1.0)
    found = Figures(1234.5, 98765.0, 0.0, 1000, 50, 0.5, (0.0123, 1.5), (0.0071, 0.02), {"decode-0": told})
    lines = shown(view, found, width)
    assert max(map(len, lines)) <= width, max(lines, key=len)
    text = "\n".join(lines)
    for said in ("0-3,6", "1234", "93%", "TTFT p50 12ms p95 1.5s", "ITL p50 7.1ms p95 20ms", "decode-2 +"):
        assert said in text, said


def test_times_are_short() -> None:
    assert [duration(s) for s in (None, 0.0071, 0.0123, 2.34)] == ["-", "7.1ms", "12ms", "2.3s"]
