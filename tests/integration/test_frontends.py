"""Several frontends behind one port: what each may break, and what must go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.deployment import RECIPES, Cli, Deployment, counter, end_all, eventually, get, up
from tests.integration.steady_load import Load, steady_load

QUICKSTART = RECIPES / "quickstart.yaml"
SEVERAL = ("--set", "frontend.port=0", "--set", "frontend.replicas=4")
CLIENTS = 24


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("frontends") / "home"
    with up(Cli(home), QUICKSTART, *SEVERAL) as deployment:
        yield deployment
    end_all(home)


async def until(check: Callable[[], bool], within_s: float = 30.0) -> None:
    """Look in a thread, again and again: the clients go on meanwhile."""
    assert await asyncio.to_thread(eventually, check, within_s)


def told(counts: str) -> None:
    """The counts are what these tests are for: `pytest -s` shows them."""
    sys.stdout.write(f"\n{counts}\n")


def restarted(deployment: Deployment, before: dict[str, Any]) -> bool:
    """Whether a frontend is ready again, in a new life."""
    row = deployment.workers("frontend")[before["index"]]
    return bool(row["ready"] and row["restarts"] == before["restarts"] + 1)


def kill_busiest(deployment: Deployment, load: Load) -> tuple[dict[str, Any], int]:
    """SIGKILL the frontend with the most connections and see it gone, no client moving meanwhile.

    Its row before, and how many connections it may have held: those that nobody has answered on yet may lead
    there as well as elsewhere.
    """
    rows = deployment.workers("frontend")
    victim = max(rows, key=lambda row: load.held_by(row["id"]))
    held = load.held_by(victim["id"]) + load.held_by("")
    os.kill(victim["pid"], signal.SIGKILL)
    assert eventually(lambda: not threads_of(victim["pid"]))
    return victim, held


def lost_by(victim: dict[str, Any], load: Load, held: int) -> int:
    """How many requests were lost with it: at most one on each of its connections, and none elsewhere."""
    lost = load.broken.total()
    assert set(load.broken) <= {victim["id"], ""}, load
    assert 0 < lost <= held, load
    return lost


def threads_of(pid: int) -> int:
    """How many threads of a process still run: the last to end closes its sockets."""
    states = []
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with suppress(OSError):
            states.append(stat.read_text().rpartition(") ")[2][0])
    return sum(state not in "ZX" for state in states)


def kv_blocks(deployment: Deployment) -> list[float]:
    pages = [get(f"{row['url']}/metrics") for row in deployment.workers("frontend")]
    return [counter(page, "dynctl_frontend_router_kv_blocks") for page in pages]


def idle(deployment: Deployment) -> bool:
    """No frontend has, or believes another to have, a request in flight."""
    pages = [get(f"{row['url']}/metrics") for row in deployment.workers("frontend")]
    names = ("router_worker_requests", "router_peer_requests", "inflight_requests")
    return not any(counter(page, f"dynctl_frontend_{name}") for page in pages for name in names)


async def test_a_killed_frontend_loses_only_its_own_connections(served: Deployment) -> None:
    assert len({row["url"] for row in served.workers("frontend")} | {served.url}) == 5
    async with steady_load(served.url, CLIENTS) as load:
        await until(lambda: len(load.done) == 4 and load.answered() > 200)
        assert not load.broken
        victim, held = kill_busiest(served, load)
        await until(lambda: restarted(served, victim))
        lost, first_life = lost_by(victim, load, held), load.done[victim["id"]]
        await until(lambda: load.done[victim["id"]] > first_life)
    told(f"one of four frontends killed: it held {held} connections, {lost} requests lost; {load}")
    assert (load.hung, load.wrong, load.broken.total()) == (0, [], lost)
    await until(lambda: idle(served))
    assert len(set(kv_blocks(served))) == 1, "the new one's index is that of the others"


async def test_a_frontend_told_to_end_loses_nothing(served: Deployment) -> None:
    async with steady_load(served.url, CLIENTS) as load:
        await until(lambda: len(load.done) == 4)
        row = (await asyncio.to_thread(served.workers, "frontend"))[0]
        os.kill(row["pid"], signal.SIGTERM)
        await until(partial(restarted, served, row))
    told(f"one of four frontends ended by SIGTERM and restarted: {load}")
    assert (load.hung, load.wrong, load.broken.total()) == (0, [], 0)


async def test_with_the_controller_away_frontends_serve_on_and_miss_a_dead_one(served: Deployment) -> None:
    cli = served.cli
    controller = int(cli.json("status", served.name)["controller_pid"])
    async with steady_load(served.url, CLIENTS) as load:
        await until(lambda: len(load.done) == 4)
        os.kill(controller, signal.SIGKILL)
        before = load.answered()
        await until(lambda: load.answered() > before + 200)
        assert not load.broken
        victim, held = kill_busiest(served, load)
        await until(lambda: misses(served, victim))
        assert any(str(victim["id"]) in doubt for doubt in cli.json("status", served.name)["doubts"])
        lost = lost_by(victim, load, held)
        await asyncio.to_thread(cli.json, "up", str(QUICKSTART), "-d", *SEVERAL)
        await until(lambda: restarted(served, victim) and not misses(served, victim))
    told(f"controller killed, then one of four frontends: it held {held}, {lost} lost; {load}")
    assert (load.hung, load.wrong, load.broken.total()) == (0, [], lost)
    await until(lambda: idle(served))


def test_thresholds_changed_at_one_frontend_hold_at_all_of_them(served: Deployment) -> None:
    def shown() -> list[Any]:
        pages = [json.loads(get(f"{row['url']}/busy_threshold")) for row in served.workers("frontend")]
        return [page["thresholds"][0]["active_prefill_tokens_threshold"] for page in pages]

    assert shown() == [None] * 4
    served.post("/busy_threshold", {"active_prefill_tokens_threshold": 123_456})
    assert eventually(lambda: shown() == [123_456] * 4)
    row = served.workers("frontend")[0]
    os.kill(row["pid"], signal.SIGTERM)
    assert eventually(lambda: restarted(served, row) and shown() == [123_456] * 4)
    served.post("/busy_threshold", {"active_prefill_tokens_threshold": None})
    assert eventually(lambda: shown() == [None] * 4)


def misses(deployment: Deployment, victim: dict[str, Any]) -> bool:
    """Whether the others say that they do not hear it."""
    other = deployment.workers("frontend")[0 if victim["index"] else 1]
    doubts = json.loads(get(f"{other['url']}/health"))["doubts"]
    return any(f"{victim['id']}: nothing is heard of it" in doubt for doubt in doubts)


def test_nobody_else_gets_a_share_of_the_port(served: Deployment, tmp_path: Path) -> None:
    """Another home knows nothing of this run: the port itself must tell."""
    port = served.url.rpartition(":")[2]
    sets = ("--set", f"frontend.port={port}", "--set", "frontend.replicas=2")
    done = Cli(tmp_path / "other").run("up", str(QUICKSTART), "-d", "--json", *sets)
    assert done.returncode == 7
    assert json.loads(done.stdout)["error"]["type"] == "port_in_use"
