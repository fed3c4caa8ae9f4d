"""What is done to a deployment while clients use it: no request may be cut, refused or wrong for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from dynctl.launchers.local import LocalLauncher
from tests.deployment import RECIPES, Cli, Deployment, end_all, eventually, get, up
from tests.integration.steady_load import Load, steady_load

QUICKSTART = RECIPES / "quickstart.yaml"
FREE_PORT = ("--set", "frontend.port=0")
CLIENTS = 12
STREAMS = 6
TOKENS = 400


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    yield Cli(tmp_path / "home")
    end_all(tmp_path / "home")


@pytest.fixture
def served(cli: Cli) -> Iterator[Deployment]:
    with up(cli, QUICKSTART, *FREE_PORT) as deployment:
        yield deployment


def row(deployment: Deployment, seat: str) -> dict[str, Any]:
    return next(r for r in deployment.ps() if r["id"] == seat)


def ids(deployment: Deployment) -> list[str]:
    return [r["id"] for r in deployment.ps()]


def controller_pid(deployment: Deployment) -> int:
    pid: int = deployment.cli.json("status", deployment.name)["controller_pid"]
    return pid


def error_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert "Traceback" not in done.stdout + done.stderr
    error: dict[str, str] = json.loads(done.stdout.splitlines()[-1])["error"]
    return error


@asynccontextmanager
async def clients(deployment: Deployment) -> AsyncIterator[Load]:
    """Short requests all the time, and long streams that outlive what is done meanwhile."""
    streams = [asyncio.create_task(long_stream(deployment.url)) for _ in range(STREAMS)]
    async with steady_load(deployment.url, CLIENTS) as load:
        await asyncio.sleep(0.5)
        yield load
    texts = await asyncio.gather(*streams)
    sys.stdout.write(f"\n{load}, {len(texts)} long streams whole\n")
    assert all(count == TOKENS for count in texts), texts
    assert (load.broken.total(), load.wrong, load.hung) == (0, [], 0)
    assert load.answered() > CLIENTS


async def long_stream(url: str) -> int:
    """Tokens of one stream of TOKENS, which takes some seconds; fewer when it broke off."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    body = json.dumps({"model": "tiny", "prompt": "tell me", "max_tokens": TOKENS, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    writer.write(f"{head}content-type: application/json\r\nconnection: close\r\n\r\n".encode() + body)
    async with asyncio.timeout(90.0):
        answer = await reader.read(-1)
    writer.close()
    assert b"[DONE]" in answer, answer[-300:]
    return answer.count(b'"text"')


async def run(deployment: Deployment, *args: str) -> subprocess.CompletedProcess[str]:
    """In a thread: the clients go on meanwhile, and are not taken for hung when it takes long."""
    return await asyncio.to_thread(deployment.cli.run, *args)


async def ran(deployment: Deployment, *args: str) -> subprocess.CompletedProcess[str]:
    done = await run(deployment, *args)
    assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


SLOW = ("--set", "engine.args.speedup=0.3", "--set", "engine.drain_timeout=1s")
"""Streams last longer than a worker drains: what is left of them has to go on elsewhere."""


async def test_restart_and_scale_cut_no_request_though_streams_outlast_the_drain(cli: Cli) -> None:
    with up(cli, QUICKSTART, *FREE_PORT, *SLOW) as served:
        before = {r["id"]: r["pid"] for r in served.ps()}
        async with clients(served) as load:
            told = await ran(served, "restart", "aggregated")
            assert "aggregated-2 stands in" in told.stderr
            await ran(served, "scale", "aggregated=4")
            assert len(ids(served)) == 5
            await ran(served, "scale", "aggregated=1")
            assert ids(served) == ["frontend-0", "aggregated-0"]
            assert load.answered()
        after = row(served, "aggregated-0")
        assert after["pid"] != before["aggregated-0"]
        assert (after["restarts"], after["incarnation"]) == (0, 2)
        assert row(served, "frontend-0")["pid"] == before["frontend-0"]

        def roles() -> Any:
            return json.loads(get(f"{served.url}/health"))["roles"]

        one = {"aggregated": {"ready": 1, "wanted": 1}}
        assert eventually(lambda: roles() == one), "frontends hear of it a moment later"
        plan = json.loads((served.run_dir / "plan.json").read_text())
        assert [p["id"] for p in plan["processes"] if p["kind"] == "worker"] == ["aggregated-0"]
        assert "replicas: 1" in (served.run_dir / "recipe.lock.yaml").read_text()


async def test_a_drain_cuts_no_request_and_outlives_the_controller(cli: Cli) -> None:
    with up(cli, QUICKSTART, *FREE_PORT, *SLOW) as served:
        async with clients(served):
            await ran(served, "drain", "aggregated/0", "--timeout", "1s")
            assert (await asyncio.to_thread(row, served, "aggregated-0"))["state"] == "drained"
            os.kill(await asyncio.to_thread(controller_pid, served), signal.SIGKILL)
            again = await run(served, "up", str(served.run_dir / "recipe.lock.yaml"), "-d", "--timeout", "4s")
            assert (again.returncode, "aggregated-0 is drained" in again.stderr) == (6, True), again.stderr
            assert (await asyncio.to_thread(row, served, "aggregated-0"))["pid"] == 0
            waited = await run(served, "wait", "--timeout", "1s", "--json")
            assert waited.returncode == 6
            assert "aggregated-0 is drained" in error_of(waited)["message"]
            await ran(served, "undrain", "local")
            await ran(served, "wait", "--for", "settled", "--timeout", "40s")


async def test_frontends_are_replaced_without_a_refused_connection_and_a_changed_recipe_rolls(
    cli: Cli, tmp_path: Path
) -> None:
    # A stream cannot leave its frontend: all have the time to end there.
    two = ("--set", "frontend.replicas=2", "--set", "engine.drain_timeout=60s")
    with up(cli, QUICKSTART, *FREE_PORT, *two) as served:
        port = served.url.rpartition(":")[2]
        recipe = (str(QUICKSTART), *two, "--set", f"frontend.port={port}")
        changed = (*recipe, "--set", "engine.args.max-num-seqs=50", "--set", "router.temperature=0.2")
        pids = {r["id"]: r["pid"] for r in served.ps()}
        async with clients(served):
            unasked = await asyncio.to_thread(served.cli.run, "up", *changed, "--json")
            assert unasked.returncode == 2
            assert "--yes" in error_of(unasked)["message"]
            assert {r["id"]: r["pid"] for r in served.ps()} == pids
            told = await ran(served, "up", *changed, "-y")
            assert "~ aggregated-1: + --max-num-seqs 50" in told.stderr
            assert "~ frontend-0: router.temperature" in told.stderr
            new = {r["id"]: r["pid"] for r in served.ps()}
            assert new.keys() == pids.keys()
            assert not set(new.values()) & set(pids.values())
            same = await ran(served, "up", *changed)
            assert "runs with this recipe already" in same.stderr
            back = await ran(served, "rollback", "-y")
            assert "~ aggregated-0: - --max-num-seqs 50" in back.stderr
            await ran(served, "restart", "frontend")
        assert "max-num-seqs" not in (served.run_dir / "recipe.lock.yaml").read_text()


@pytest.mark.parametrize("verb", ["restart", "scale", "down to one"])
async def test_a_controller_killed_in_the_middle_is_gone_on_for_by_the_next(cli: Cli, verb: str) -> None:
    with up(cli, QUICKSTART, *FREE_PORT, *SLOW) as served:
        asked = {
            "restart": ("restart", "aggregated"),
            "scale": ("scale", "aggregated=4"),
            "down to one": ("scale", "aggregated=1"),
        }[verb]
        wanted = {"restart": 2, "scale": 4, "down to one": 1}[verb]
        before = row(served, "aggregated-0")["pid"]
        async with clients(served):
            begun = await ran(served, *asked, "--no-wait", "--json")
            assert json.loads(begun.stdout)["changing"]
            os.kill(controller_pid(served), signal.SIGKILL)
            assert await asyncio.to_thread(
                lambda: served.cli.run("up", str(served.run_dir / "recipe.lock.yaml"), "-d").returncode == 0
            )
            await ran(served, "wait", "--for", "settled", "--timeout", "40s")
            rows = served.workers("aggregated")
            assert [r["index"] for r in rows] == list(range(wanted))
            assert all(r["ready"] for r in rows)
            assert (rows[0]["pid"] != before) == (verb == "restart")
        lives = {(o.process_id, o.incarnation) for o in LocalLauncher().owned(served.run_dir.name)}
        wanted_there = {(r["id"], r["incarnation"]) for r in served.ps()}
        assert {one for one in lives if one[0] != "controller"} == wanted_there


def test_a_recipe_that_does_not_live_stops_at_the_first_replica_and_can_be_rolled_back(
    served: Deployment,
) -> None:
    port = served.url.rpartition(":")[2]
    bad = ("--set", f"frontend.port={port}", "--set", "engine.args.fault-die-at-start=no memory")
    done = served.cli.run("up", str(QUICKSTART), *bad, "-y", "--json")
    assert done.returncode == 5
    error = error_of(done)
    assert "no memory" in error["message"]
    assert "rollback" in error["message"]
    assert served.cli.json("chat", "Hello", "--max-tokens", "4")["content"]
    assert served.cli.run("rollback", "-y").returncode == 0
    assert eventually(lambda: all(r["ready"] for r in served.ps()))
    assert served.cli.run("rollback", "--json").returncode == 2


def test_what_cannot_be_is_refused_with_its_reason_and_changes_nothing(served: Deployment) -> None:
    cli = served.cli
    before = (served.run_dir / "plan.json").read_bytes()
    for words, code, said in (
        (("scale", "aggregated=0"), 2, "cannot be served without aggregated"),
        (("scale", "decode=2"), 2, "no role 'decode'"),
        (("scale", "frontend=2"), 2, "frontend.replicas"),
        (("scale", "aggregated"), 2, "is not ROLE=N"),
        (("restart", "aggregated/7"), 2, "no process 'aggregated/7'"),
        (("drain", "n7"), 2, "no process 'n7'"),
        (("wait", "--for", "lunch"), 2, "cannot wait for 'lunch'"),
        (("rollback",), 2, "no former recipe"),
    ):
        done = cli.run(*words, "--json")
        assert (done.returncode, said in error_of(done)["message"]) == (code, True), done.stdout
    other = cli.run("up", str(QUICKSTART), "-y", "--json", *FREE_PORT, "--set", "model.served_name=other")
    assert other.returncode == 3
    assert "while it serves" in error_of(other)["message"]
    assert (served.run_dir / "plan.json").read_bytes() == before


def test_a_locked_deployment_is_changed_by_nobody_but_with_force_and_the_audit_tells_who(
    served: Deployment,
) -> None:
    cli = served.cli
    assert cli.json("lock", "-m", "benchmark until 14:00")["locked"] == "benchmark until 14:00"
    for words in (
        ("scale", "aggregated=1"),
        ("restart", "aggregated"),
        ("drain", "aggregated/1"),
        ("lock", "-m", "mine"),
        ("down",),
    ):
        refused = cli.run(*words, "--json")
        assert refused.returncode == 2, words
        assert "benchmark until 14:00" in error_of(refused)["message"]
    assert "benchmark until 14:00" in cli.run("status").stdout
    assert cli.run("scale", "aggregated=1", "--force").returncode == 0
    assert cli.run("unlock").returncode == 0
    assert cli.run("scale", "aggregated=2", "--no-wait").returncode == 0
    lines = [json.loads(line) for line in cli.run("events", "--audit", "--json").stdout.splitlines()]
    told = [(line["event"], line["args"], line["outcome"].split(":")[0]) for line in lines]
    assert told[0] == ("up", str(QUICKSTART) + " frontend.port=0", "done")
    assert told[1:] == [
        ("lock", "benchmark until 14:00", "done"),
        ("scale", "aggregated=1", "refused"),
        ("restart", "aggregated", "refused"),
        ("drain", "aggregated/1", "refused"),
        ("lock", "mine", "refused"),
        ("down", "", "refused"),
        ("scale", "aggregated=1 --force", "done"),
        ("unlock", "", "done"),
        ("scale", "aggregated=2", "done"),
    ]
    assert {"user", "host", "ts"} <= set(lines[0])


async def test_prefill_and_decode_are_changed_apart_and_no_hand_off_is_lost(cli: Cli) -> None:
    roles = (
        "--unset",
        "roles.aggregated",
        "--set",
        "roles.prefill.replicas=2",
        "--set",
        "roles.decode.replicas=2",
    )
    with up(cli, QUICKSTART, *FREE_PORT, *SLOW, *roles) as served:
        async with clients(served):
            await ran(served, "restart", "prefill")
            await ran(served, "scale", "prefill=1", "decode=3")
            await ran(served, "restart", "decode/0")
            assert ids(served) == ["frontend-0", "prefill-0", "decode-0", "decode-1", "decode-2"]
        seen = served.cli.json("top", "--once", "-n", "0.5s")
        assert [w["id"] for w in seen["workers"]] == ids(served)[1:]

        def idle() -> bool:
            told = served.cli.json("top", "--once", "-n", "0.2s")["workers"]
            return all(one["running"] == 0 for one in told)

        assert eventually(idle, within_s=20), "what engines say of themselves is up to a second old"
