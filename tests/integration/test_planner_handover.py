"""Demand turns from prompts to answers and back within a fixed number of GPUs: the planner has a worker
change its role in place, and no request is cut.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.planner.journal import Entry
from tests.deployment import Cli, Deployment, counter, end_all, get, up
from tests.integration.test_handover import events, row, workers
from tests.integration.test_planner import Traffic, journal, until

LAW = {
    "version": 1,
    "name": "slow",
    "prefill": {"tokens": [0, 10000], "seconds": [0.005, 3.005]},
    "decode": {"batch": [1, 8], "context": [0, 10000], "seconds": [[0.01, 0.01], [0.05, 0.05]]},
    "transfer": {"bytes_per_token": 1000, "bytes_per_s": 1e9},
    "limits": {"kv_tokens": 100000, "sequences": 256, "batched_tokens": 8192},
}
"""A prompt of 250 tokens takes 80 ms, and no more than 6 answers are within 40 ms a token: of three GPUs
either two read, or two write.
"""

RECIPE = """
schema: dynctl/v1
name: turning
model: {{path: "builtin:tiny", served_name: tiny}}
backend: mocker
engine:
  args: {{profile: {law}}}
  drain_timeout: 10s
roles:
  prefill: {{replicas: 2}}
  decode: {{replicas: 1}}
frontend: {{port: 0}}
sla: {{ttft: 500ms, itl: 40ms, percentile: p90}}
planner:
  max_gpus: 3
  interval: 2s
  load_interval: 500ms
  cooldown: 12s
  boot_time: 2s
  predictor: constant
  profile: {law}
"""
PROMPTS = {"rate": 16.0, "pairs": 25, "tokens": 4}
ANSWERS = {"rate": 5.0, "pairs": 3, "tokens": 60}
"""Three decode workers would have enough to do: shares are moved at once, whatever the cool-down."""
WITHIN_S = 40.0


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    law = tmp_path / "law.json"
    law.write_text(json.dumps(LAW))
    path = tmp_path / "turning.yaml"
    path.write_text(RECIPE.format(law=law))
    return path


def turn(traffic: Traffic, to: dict[str, Any]) -> None:
    for name, value in to.items():
        setattr(traffic, name, value)


def changes(served: Deployment) -> list[Entry]:
    return [entry for entry in journal(served) if entry.decision.changed]


def moves(entry: Entry) -> dict[str, tuple[int, int]]:
    return {role: (one.current, one.target) for role, one in entry.decision.roles.items()}


async def there(served: Deployment, seat: str) -> dict[str, Any]:
    """That seat, once it serves."""

    async def serves() -> bool:
        ids = await asyncio.to_thread(workers, served)
        return seat in ids and (await asyncio.to_thread(row, served, seat))["state"] == "ready"

    assert await until(serves, WITHIN_S), served.cli.run("planner", "why", "-n", "30").stdout
    return await asyncio.to_thread(row, served, seat)


def aborted(worker: dict[str, Any]) -> float:
    metrics = get(f"{worker['url']}/metrics")
    return counter(metrics, "vllm:request_success_total", finished_reason="abort")


async def test_demand_that_turns_to_answers_and_back_turns_the_same_engine_with_it(
    cli: Cli, recipe: Path
) -> None:
    with up(cli, recipe) as served:
        before = {r["id"]: r for r in await asyncio.to_thread(served.ps)}
        traffic = Traffic(served.url)
        turn(traffic, PROMPTS)
        asking = asyncio.create_task(traffic.run())

        async def forecast() -> bool:
            return sum(entry.interval is not None for entry in journal(served)) >= 2

        assert await until(forecast, WITHIN_S)
        assert changes(served) == []
        turn(traffic, ANSWERS)
        writes = await there(served, "decode-1")
        told = await asyncio.to_thread(cli.run, "planner", "why", "-n", "1", "--changes")
        turn(traffic, PROMPTS)
        reads = await there(served, "prefill-1")
        traffic.ending = True
        await asyncio.wait_for(asking, 60.0)
        metrics = get(f"{served.url}/metrics")
        after = {r["id"]: r for r in await asyncio.to_thread(served.ps)}
        lost = [aborted(worker) for seat, worker in after.items() if seat != "frontend-0"]

    assert len(changes(served)) == 2, [(e.decision.reason, e.outcome) for e in changes(served)]
    there_, back = changes(served)
    assert moves(there_) == {"prefill": (2, 1), "decode": (1, 2)}
    assert moves(back) == {"prefill": (1, 2), "decode": (2, 1)}
    assert there_.outcome == "done: prefill-1 becomes decode-1, its engine runs on"
    assert back.outcome == "done: decode-1 becomes prefill-1, its engine runs on"
    for said in ("prefill 2 -> 1, decode 1 -> 2", there_.outcome, there_.decision.roles["decode"].why):
        assert said in told.stdout
    assert [(e["id"], e["before"]) for e in events(served, "process.took_over")] == [
        ("decode-1", "prefill-1"),
        ("prefill-1", "decode-1"),
    ]
    for taken, role in ((writes, "decode"), (reads, "prefill")):
        assert taken["role"] == role
        for same in ("engine_pid", "pid", "url", "gpus", "node"):
            assert taken[same] == before["prefill-1"][same], same
    assert {seat: row["engine_pid"] for seat, row in after.items()} == {
        seat: row["engine_pid"] for seat, row in before.items()
    }

    assert traffic.failed == []
    assert traffic.answered > 50
    assert counter(metrics, "dynctl_frontend_requests_total") == traffic.answered
    assert counter(metrics, "dynctl_frontend_requests_total", status="success") == traffic.answered
    assert lost == [0.0, 0.0, 0.0]
