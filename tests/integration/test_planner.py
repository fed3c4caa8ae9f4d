"""The planner over a real deployment of simulated engines: it follows the load, and cuts no request."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dynctl.planner.journal import Entry, read
from tests.deployment import Cli, Deployment, counter, end_all, get, up

LAW = {
    "version": 1,
    "name": "slow",
    "prefill": {"tokens": [0, 10000], "seconds": [0.005, 3.005]},
    "decode": {"batch": [1, 64], "context": [0, 10000], "seconds": [[0.01, 0.01], [0.05, 0.05]]},
    "transfer": {"bytes_per_token": 1000, "bytes_per_s": 1e9},
    "limits": {"kv_tokens": 100000, "sequences": 256, "batched_tokens": 8192},
}
"""A prompt of 250 tokens takes 80 ms: one prefill worker does twelve a second."""

RECIPE = """
schema: dynctl/v1
name: planned
model: {{path: "builtin:tiny", served_name: tiny}}
backend: mocker
engine:
  args: {{profile: {law}}}
  drain_timeout: 10s
roles:
  prefill: {{replicas: 1}}
  decode: {{replicas: 1}}
frontend: {{port: 0}}
sla: {{ttft: 400ms, itl: 40ms, percentile: p90}}
planner:
  interval: 2s
  load_interval: 500ms
  cooldown: 6s
  boot_time: 2s
  predictor: moving_average
  profile: {law}
  roles:
    prefill: {{max_replicas: 3}}
    decode: {{max_replicas: 3}}
"""


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    law = tmp_path / "law.json"
    law.write_text(json.dumps(LAW))
    path = tmp_path / "planned.yaml"
    path.write_text(RECIPE.format(law=law))
    return path


@dataclass
class Traffic:
    """Requests that come at `rate` a second, of so many pairs of words, for so many tokens; what became of
    them.
    """

    url: str
    rate: float = 1.0
    pairs: int = 25
    tokens: int = 30
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    ending: bool = False

    async def run(self) -> None:
        """Until `ending`, then every request is let end."""
        rng, asked = random.Random(7), set[asyncio.Task[None]]()
        while not self.ending:
            await asyncio.sleep(rng.expovariate(self.rate) if self.rate else 0.1)
            if self.rate:
                asked.add(asyncio.create_task(self._ask(rng.randrange(1 << 30), self.tokens)))
        await asyncio.gather(*asked)

    async def _ask(self, number: int, tokens: int) -> None:
        host, _, port = self.url.removeprefix("http://").partition(":")
        words = " ".join(f"{number} {i}" for i in range(self.pairs))
        body = json.dumps({"model": "tiny", "prompt": words, "max_tokens": tokens, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        try:
            async with asyncio.timeout(60.0):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(
                    f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body
                )
                answer = await reader.read(-1)
                writer.close()
        except (OSError, TimeoutError) as error:
            self.failed.append(repr(error))
            return
        if b"[DONE]" in answer and answer.count(b'"text"') == tokens:
            self.answered += 1
        else:
            self.failed.append(answer[-200:].decode(errors="replace"))


async def until(check: Callable[[], Awaitable[bool]], within_s: float) -> bool:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if await check():
            return True
        await asyncio.sleep(0.3)
    return False


def ready(served: Deployment, role: str) -> int:
    return sum(row["ready"] for row in served.workers(role))


def journal(served: Deployment) -> list[Entry]:
    return read(served.run_dir / "planner.jsonl")


async def test_it_follows_the_load_up_and_down_and_cuts_no_request(cli: Cli, recipe: Path) -> None:
    with up(cli, recipe) as served:
        traffic = Traffic(served.url)
        asking = asyncio.create_task(traffic.run())

        async def prefills(count: int) -> bool:
            return await asyncio.to_thread(ready, served, "prefill") == count

        assert await until(lambda: intervals(served, 1), 30.0)
        traffic.rate = 16.0
        assert await until(lambda: more(served), 60.0), cli.run("planner", "why", "-n", "30").stdout
        busy = get(f"{served.url}/metrics")
        traffic.rate = 1.0
        assert await until(lambda: prefills(1), 60.0), cli.run("planner", "why", "-n", "30").stdout
        traffic.ending = True
        await asyncio.wait_for(asking, 60.0)
        why = cli.run("planner", "why", "-n", "3", "--changes")
        status = cli.json("status")
    assert traffic.failed == []
    assert traffic.answered > 50
    assert counter(busy, "dynctl_planner_target_replicas", role="prefill") >= 2
    assert counter(busy, "dynctl_planner_decisions_total", decision="up") >= 1
    assert why.returncode == 0
    assert "prefill" in why.stdout
    assert "last change" in status["planner"]
    assert max(entry.decision.roles["prefill"].floor or 0 for entry in journal(served)) >= 2
    made = [entry for entry in journal(served) if entry.decision.changed]
    assert {entry.outcome for entry in made} == {"done"}
    assert all(one.why for entry in made for one in entry.decision.roles.values())


async def test_without_a_profile_it_plans_from_the_estimate_and_corrects_it(cli: Cli, recipe: Path) -> None:
    forecast_only = ("--set", "planner.mode=throughput", "--unset", "planner.profile")
    with up(cli, recipe, *forecast_only) as served:
        traffic = Traffic(served.url, rate=16.0)
        asking = asyncio.create_task(traffic.run())
        assert await until(lambda: more(served), 60.0), cli.run("planner", "why", "-n", "30").stdout
        assert await until(lambda: known_by(served, "estimate, corrected"), 30.0)
        traffic.ending = True
        await asyncio.wait_for(asking, 60.0)
        shown: dict[str, Any] = cli.json("planner", "show")
    assert {role: one["costs"] for role, one in shown["roles"].items()} == {
        "prefill": "estimate",
        "decode": "estimate",
    }
    first = next(entry.decision for entry in journal(served) if entry.decision.changed)
    assert first.roles["prefill"].code == "up"
    assert first.by["prefill"].startswith("estimate")
    assert traffic.failed == []


async def known_by(served: Deployment, source: str) -> bool:
    return journal(served)[-1].decision.by["prefill"] == source


async def more(served: Deployment) -> bool:
    return await asyncio.to_thread(ready, served, "prefill") >= 2


async def test_a_controller_killed_in_between_goes_on_with_the_journal(cli: Cli, recipe: Path) -> None:
    with up(cli, recipe) as served:
        traffic = Traffic(served.url, rate=3.0)
        asking = asyncio.create_task(traffic.run())
        assert await until(lambda: intervals(served, 2), 30.0)
        before = journal(served)
        pid: int = cli.json("status")["controller_pid"]
        os.kill(pid, signal.SIGKILL)
        again = await asyncio.to_thread(cli.run, "up", str(served.run_dir / "recipe.lock.yaml"), "-d", "-y")
        assert again.returncode == 0, again.stderr
        assert await until(lambda: intervals(served, len(before) + 2), 30.0)
        traffic.ending = True
        await asyncio.wait_for(asking, 60.0)
        after = journal(served)
    assert after[: len(before)] == before
    assert traffic.failed == []


async def intervals(served: Deployment, count: int) -> bool:
    return sum(entry.interval is not None for entry in journal(served)) >= count


async def test_advisory_only_tells(cli: Cli, recipe: Path) -> None:
    more_: tuple[str, ...] = (
        *("--set", "planner.advisory=true"),
        *("--set", "planner.roles.prefill.min_replicas=2"),
    )
    with up(cli, recipe, *more_) as served:

        async def told() -> bool:
            return any(entry.outcome.startswith("advisory") for entry in journal(served))

        assert await until(told, 30.0)
        assert await asyncio.to_thread(ready, served, "prefill") == 1
        shown: dict[str, Any] = cli.json("planner", "show")
        assert shown["advisory"] is True
        assert "advisory" in shown["state"]


async def test_a_lock_is_respected_and_told_and_growth_is_not_tried_in_a_tight_loop(
    cli: Cli, recipe: Path
) -> None:
    with up(cli, recipe) as served:
        assert cli.run("lock", "-m", "nobody touch it").returncode == 0
        at_least = cli.run(
            *("up", str(recipe), "-d", "-y", "--force"),
            *("--set", "planner.roles.prefill.min_replicas=2"),
        )
        assert at_least.returncode == 0, at_least.stderr

        async def refused() -> bool:
            return any("locked" in entry.outcome for entry in journal(served))

        assert await until(refused, 30.0), cli.run("planner", "why").stdout
        await asyncio.sleep(5.0)
        tried = [entry for entry in journal(served) if entry.decision.changed]
        assert len(tried) == 1
        assert "tried again in" in journal(served)[-1].decision.reason
        assert await asyncio.to_thread(ready, served, "prefill") == 1
        assert cli.run("unlock").returncode == 0
