"""A worker changes between prefill and decode while clients use it, and its engine runs on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.controller.amending import scale
from dynctl.deploy.home import RunDir
from tests.deployment import Cli, Deployment, counter, end_all, eventually, get, up
from tests.integration.steady_load import steady_load
from tests.integration.test_day2 import SLOW, clients
from tests.integration.worker_rig import alive

RECIPE = """
schema: dynctl/v1
name: two
model: {path: "builtin:tiny", served_name: tiny}
backend: mocker
engine: {drain_timeout: 5s}
roles:
  prefill: {replicas: 3}
  decode: {replicas: 2}
frontend: {port: 0}
"""
CLIENTS = 8
PROMPT_BLOCKS = 15


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    path.write_text(RECIPE)
    return path


def row(served: Deployment, seat: str) -> dict[str, Any]:
    return next(r for r in served.ps() if r["id"] == seat)


def workers(served: Deployment) -> list[str]:
    return sorted(r["id"] for r in served.ps() if r["role"] != "frontend")


def events(served: Deployment, name: str) -> list[dict[str, Any]]:
    lines = (served.run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def routed(served: Deployment, seat: str) -> float:
    """Requests that this worker has been given so far."""
    return counter(get(f"{served.url}/metrics"), "dynctl_frontend_router_choices_total", worker=seat)


def marked(pid: int) -> dict[str, str]:
    """What dynctl has put into the environment of a process."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return {k: v for k, _, v in (pair.partition("=") for pair in pairs) if k.startswith("DYNCTL_")}


async def scaled(served: Deployment, *roles: str) -> str:
    done = await asyncio.to_thread(served.cli.run, "scale", *roles)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stderr


async def test_an_engine_serves_on_in_the_other_role_and_no_request_is_broken(cli: Cli, recipe: Path) -> None:
    with up(cli, recipe) as served:
        before = {r["id"]: r for r in served.ps()}
        async with steady_load(served.url, CLIENTS) as load:
            await asyncio.sleep(0.5)
            told = await scaled(served, "prefill=2", "decode=3")
            assert "prefill-2 becomes decode-2, its engine runs on" in told
            assert await asyncio.to_thread(eventually, lambda: routed(served, "decode-2") > 0)
            now = {r["id"]: r for r in await asyncio.to_thread(served.ps)}
            assert await asyncio.to_thread(workers, served) == [
                *("decode-0", "decode-1", "decode-2", "prefill-0", "prefill-1")
            ]
            former, taken = before["prefill-2"], now["decode-2"]
            for same in ("engine_pid", "pid", "url", "gpus", "node"):
                assert taken[same] == former[same], same
            assert (taken["role"], taken["state"], taken["restarts"]) == ("decode", "ready", 0)
            assert marked(taken["pid"])["DYNCTL_PROCESS"] == "decode-2"
            for seat in ("decode-0", "prefill-0", "frontend-0"):
                assert now[seat]["pid"] == before[seat]["pid"]

            # Killed afterwards, it comes back in its new role; what it was has been given up for good.
            os.kill(taken["engine_pid"], signal.SIGKILL)

            def back() -> bool:
                found = row(served, "decode-2")
                return found["state"] == "ready" and found["engine_pid"] not in (0, taken["engine_pid"])

            assert await asyncio.to_thread(eventually, back)
            assert "prefill-2" not in await asyncio.to_thread(workers, served)

            # And one that has its former name is another: starting it leaves the engine of decode-1 alone.
            await scaled(served, "prefill=3", "decode=2")
            await scaled(served, "prefill=4")
            assert len(await asyncio.to_thread(workers, served)) == 6
            assert load.answered()
        assert (load.broken.total(), load.wrong, load.hung) == (0, [], 0)
        assert load.answered() > CLIENTS
        assert [(e["id"], e["before"]) for e in events(served, "process.took_over")] == [
            ("decode-2", "prefill-2"),
            ("prefill-2", "decode-2"),
        ]
        plan = json.loads((served.run_dir / "plan.json").read_text())
        assert {role: count for role, count in plan["roles"].items()} == {"prefill": 4, "decode": 2}
        logs = served.cli.run("logs", served.name, "decode/2")
        assert logs.returncode == 0, logs.stderr


async def test_streams_that_outlast_the_drain_go_on_elsewhere_while_their_engine_turns_to_prefill(
    cli: Cli, recipe: Path
) -> None:
    with up(cli, recipe, *SLOW) as served:
        engine = row(served, "decode-1")["engine_pid"]
        async with clients(served):
            await scaled(served, "prefill=4", "decode=1")
            there = await asyncio.to_thread(row, served, "prefill-3")
            assert (there["engine_pid"], there["state"]) == (engine, "ready")
        assert counter(get(f"{served.url}/metrics"), "dynctl_frontend_model_migration_total") > 0


async def test_one_that_went_to_and_fro_is_not_taken_for_what_its_name_was(cli: Cli, recipe: Path) -> None:
    """The engine has the names of its first start for good."""
    with up(cli, recipe) as served:
        engine = row(served, "prefill-2")["engine_pid"]
        async with steady_load(served.url, CLIENTS) as load:
            await scaled(served, "prefill=2", "decode=3")
            await scaled(served, "prefill=3")  # a new prefill-2, beside an engine that was started as that
            taken = await asyncio.to_thread(row, served, "decode-2")
            assert (taken["engine_pid"], taken["state"]) == (engine, "ready")
            fresh = await asyncio.to_thread(row, served, "prefill-2")
            assert fresh["engine_pid"] not in (0, engine)
            assert fresh["incarnation"] == 2
            await scaled(served, "decode=2", "prefill=4")
            there = await asyncio.to_thread(row, served, "prefill-3")
            assert (there["engine_pid"], there["state"]) == (engine, "ready")
            os.kill(there["pid"], signal.SIGKILL)  # its sidecar: the engine must not outlive that
            assert await asyncio.to_thread(
                eventually, lambda: row(served, "prefill-3")["engine_pid"] not in (0, engine)
            )
            assert not alive(engine)
            assert await asyncio.to_thread(eventually, lambda: row(served, "prefill-3")["state"] == "ready")
        assert (load.broken.total(), load.wrong, load.hung) == (0, [], 0)


async def test_what_cannot_be_handed_over_is_drained_ended_and_started(cli: Cli, recipe: Path) -> None:
    """The sidecar dies of the wish; the seat comes up with an engine of its own, and nothing else changes."""
    with up(cli, recipe) as served:
        former = row(served, "prefill-2")
        async with steady_load(served.url, CLIENTS) as load:
            changing = asyncio.create_task(scaled(served, "prefill=2", "decode=3"))
            assert await asyncio.to_thread(eventually, lambda: bool(events(served, "process.becoming")))
            os.kill(former["pid"], signal.SIGKILL)
            await changing
            taken = await asyncio.to_thread(row, served, "decode-2")
            assert taken["state"] == "ready"
            assert taken["engine_pid"] not in (0, former["engine_pid"])
            assert taken["restarts"] == 0
        assert (load.broken.total(), load.wrong, load.hung) == (0, [], 0)
        assert not events(served, "process.took_over")
        assert not alive(former["engine_pid"])


async def test_a_controller_killed_on_the_way_loses_neither_engine_nor_seat(cli: Cli, recipe: Path) -> None:
    with up(cli, recipe) as served:
        former = row(served, "prefill-2")
        async with steady_load(served.url, CLIENTS) as load:
            changing = asyncio.create_task(
                asyncio.to_thread(served.cli.run, "scale", "prefill=2", "decode=3", "--no-wait")
            )
            assert await asyncio.to_thread(eventually, lambda: bool(events(served, "process.becoming")))
            pid = (await asyncio.to_thread(served.cli.json, "status", served.name))["controller_pid"]
            os.kill(pid, signal.SIGKILL)
            await changing
            assert await asyncio.to_thread(
                eventually, lambda: marked(former["pid"]).get("DYNCTL_PROCESS") == "decode-2"
            )
            again = await asyncio.to_thread(
                served.cli.run, "up", str(served.run_dir / "recipe.lock.yaml"), "-d", "-y"
            )
            assert again.returncode == 0, again.stderr
            waited = await asyncio.to_thread(served.cli.run, "wait", "--for", "settled", "--timeout", "40s")
            assert waited.returncode == 0, waited.stderr
            taken = await asyncio.to_thread(row, served, "decode-2")
            assert (taken["engine_pid"], taken["state"]) == (former["engine_pid"], "ready")
            assert len(await asyncio.to_thread(workers, served)) == 5
        assert (load.broken.total(), load.wrong, load.hung) == (0, [], 0)


async def test_what_the_engine_holds_is_known_of_it_in_its_new_role(cli: Cli, recipe: Path) -> None:
    """Prompts that it has had for decode count for it as a prefill worker, new as that is to frontends."""
    one = ("--set", "roles.prefill.replicas=1", "--set", "roles.decode.replicas=2")
    with up(cli, recipe, *one) as served:
        engine = row(served, "decode-1")["engine_pid"]
        for number in range(8):
            prompt = f"{number} " + "the same long words " * 60
            served.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1})

        def blocks(seat: str) -> float:
            return counter(get(f"{served.url}/metrics"), "dynctl_frontend_router_kv_blocks", worker=seat)

        assert eventually(lambda: blocks("prefill-0") == 8 * PROMPT_BLOCKS), blocks("prefill-0")
        held = PROMPT_BLOCKS * routed(served, "decode-1")
        assert held
        await scaled(served, "prefill=2", "decode=1")
        assert row(served, "prefill-1")["engine_pid"] == engine
        assert eventually(lambda: blocks("prefill-1") == held), (held, blocks("prefill-1"))


def test_what_the_planner_moves_from_prefill_to_decode_is_the_running_engine(cli: Cli, recipe: Path) -> None:
    with up(cli, recipe) as served:
        former = row(served, "prefill-2")
        scale(RunDir(served.run_dir), {"prefill": 2, "decode": 3})
        waited = cli.run("wait", "--for", "settled", "--timeout", "40s")
        assert waited.returncode == 0, waited.stderr
        taken = row(served, "decode-2")
        assert (taken["engine_pid"], taken["state"]) == (former["engine_pid"], "ready")
        assert "prefill-2" not in workers(served)
