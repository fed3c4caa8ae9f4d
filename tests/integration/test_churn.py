"""Requests while workers come and go: nothing hangs, nothing is lost, every text is right."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from dynctl.errors import DynctlError
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.mocker.tokens import BUILTIN, Vocabulary
from dynctl.protocol.instances import ModelCard, Role
from dynctl.protocol.specs import FrontendSpec, LimitsSpec, MigrationSpec, RouterSpec, WorkerSpec
from tests.integration.frontend_harness import make_spec
from tests.integration.nursery import Nursery, send
from tests.integration.worker_rig import Rig, alive, free_port, until

REQUESTS = 1536
JOINS = 250
KILLS = 150
IN_FLIGHT = 64
DEADLINE_S = 60.0
LEAST = 3
"""Workers of a role that are left alone, so that there is always somewhere to go."""
BLOCK = 16
MODEL = "tiny"


@dataclass
class Pair:
    """One worker: a simulated engine and its sidecar."""

    role: Role
    index: int
    engine: int
    sidecar: int
    url: str

    @property
    def id(self) -> str:
        return f"{self.role}-{self.index}"


@dataclass
class Outcome:
    """What became of the requests; `wrong` says more of what should not have been."""

    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Fleet:
    """Workers that come and go under one registry."""

    def __init__(self, rig: Rig, nursery: Nursery, rng: Random) -> None:
        self.rig = rig
        self.rng = rng
        self.alive: dict[Role, list[Pair]] = {"prefill": [], "decode": []}
        self.joined = 0
        self.gone: Counter[str] = Counter()
        self._nursery = nursery
        self._leaving: set[asyncio.Task[None]] = set()

    def join(self, role: Role) -> None:
        """A new engine and its sidecar."""
        index, port = self.joined, free_port()
        self.joined += 1
        url, kv, replay = f"http://127.0.0.1:{port}", free_port(), free_port()
        kv_role = "kv_producer" if role == "prefill" else "kv_consumer"
        events: dict[str, Any] = {
            "enable_kv_cache_events": True,
            "endpoint": f"tcp://127.0.0.1:{kv}",
            "replay_endpoint": f"tcp://127.0.0.1:{replay}",
            "topic": "kv-events",
        }
        engine = self._nursery.fork(
            "engine",
            [
                *("--port", str(port), "--served-model-name", MODEL, "--speedup", "0.4"),
                *("--block-size", str(BLOCK), "--num-gpu-blocks-override", "2048"),
                *("--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": kv_role})),
                *("--kv-events-config", json.dumps(events), "--shutdown-timeout", "20"),
            ],
            f"engine-{role}-{index}",
        )
        spec = WorkerSpec(
            id=f"{role}-{index}",
            role=role,
            index=index,
            node="n",
            backend="mocker",
            model=ModelCard(name=MODEL, path=str(BUILTIN)),
            url=url,
            registry=self.rig.control,
            keys_file="keys.json",
            bind_host="127.0.0.1",
            events_port=0,
            control_port=0,
            kv_endpoints=[events["endpoint"]],
            kv_replay_endpoints=[events["replay_endpoint"]],
            kv_topic="kv-events",
        )
        path = self.rig.run_dir / f"{spec.id}.json"
        path.write_bytes(msgspec.json.encode(spec))
        env = {"DYNCTL_RUN": "churn", "DYNCTL_PROCESS": spec.id, "DYNCTL_INCARNATION": "1"}
        sidecar = self._nursery.fork("worker", ["--spec", str(path)], spec.id, **env)
        self.alive[role].append(Pair(role, index, engine, sidecar, url))

    def kill(self) -> None:
        """SIGKILL a worker that serves; every other time nobody tells the registry."""
        pair = self._take()
        if pair is None:
            return
        for pid in (pair.engine, pair.sidecar) if self.rng.random() < 0.5 else (pair.sidecar, pair.engine):
            send(pid, signal.SIGKILL)
        self.gone["SIGKILL"] += 1
        if self.rng.random() < 0.5:
            self.rig.registry.gone(pair.id, 1)

    def leave(self) -> None:
        """A worker goes in good order: out of routing, its requests finished, then ended."""
        pair = self._take()
        if pair is None:
            return
        send(pair.sidecar, signal.SIGTERM)
        self.gone["graceful"] += 1
        task = asyncio.get_running_loop().create_task(self._end_engine(pair))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _end_engine(self, pair: Pair) -> None:
        """Once the sidecar has drained it."""
        await until(lambda: not alive(pair.sidecar), DEADLINE_S)
        send(pair.engine, signal.SIGTERM)

    def _take(self) -> Pair | None:
        ready = {m.instance.id for m in self.rig.registry.members() if m.state == "ready"}
        roles = [role for role, pairs in self.alive.items() if sum(p.id in ready for p in pairs) > LEAST]
        if not roles:
            return None
        pairs = self.alive[self.rng.choice(roles)]
        chosen = self.rng.choice([pair for pair in pairs if pair.id in ready])
        pairs.remove(chosen)
        return chosen

    async def settled(self) -> None:
        """All that were leaving have been told to."""
        await asyncio.gather(*self._leaving)


class Clients:
    """Sends requests whose right answers are known beforehand."""

    def __init__(self, port: int, rng: Random) -> None:
        self._origin = Origin("http", "127.0.0.1", port)
        self._client = Client(resend=False)
        self._rng = rng
        self._words = Vocabulary(BUILTIN)
        prefixes = [[rng.randrange(10, 2000) for _ in range(BLOCK * rng.randrange(2, 12))] for _ in range(24)]
        self._prefixes = prefixes
        self.outcome = Outcome()

    async def run(self, count: int) -> None:
        """So many requests, `IN_FLIGHT` at a time."""
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await self._one(number)

        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
        await self._client.close()

    def _question(self, number: int) -> tuple[str, dict[str, Any], list[int]]:
        """A path, a body, and the prompt's tokens as the engines see them."""
        rng, stream = self._rng, number % 5 != 0
        options = {
            "model": MODEL,
            "stream": stream,
            "max_tokens": rng.randrange(8, 96),
            "ignore_eos": True,
            "temperature": 0,
        }
        if number % 2:
            prompt = [*rng.choice(self._prefixes), *(rng.randrange(10, 2000) for _ in range(20))]
            return "/v1/completions", {**options, "prompt": prompt}, prompt
        messages = [{"role": "user", "content": f"question {rng.randrange(40)} of {number % 7}"}]
        text = self._words.render(messages, generate=True, resume=False)
        return (
            "/v1/chat/completions",
            {**options, "messages": messages},
            self._words.encode(text, special=False),
        )

    async def _one(self, number: int) -> None:
        path, body, prompt = self._question(number)
        source = self._words.source(prompt, 0)
        right = "".join(self._words.texts[source.next(False)] for _ in range(body["max_tokens"]))
        try:
            async with asyncio.timeout(DEADLINE_S):
                text, end = await self._ask(path, body)
        except TimeoutError:
            text, end = "", "hung"
        except DynctlError as error:
            text, end = "", f"lost: {error.kind}"
        if end == "whole" and text.strip() != right.strip():
            end = "wrong text"
        self.outcome.ends[end] += 1
        if end != "whole":
            self.outcome.wrong.append(
                f"#{number} {path} stream={body['stream']}: {end}\n {text!r}\n {right!r}"
            )

    async def _ask(self, path: str, body: dict[str, Any]) -> tuple[str, str]:
        """The text, and how it ended: "whole" or what was wrong."""
        timeouts = Timeouts(connect_s=DEADLINE_S, first_byte_s=DEADLINE_S, stall_s=DEADLINE_S)
        stream = await self._client.open(
            self._origin, "POST", path, body=json.dumps(body).encode(), timeouts=timeouts
        )
        told = (await stream.read(1 << 24)).decode()
        if stream.status != 200:
            return "", f"status {stream.status}: {told[:200]}"
        if not body["stream"]:
            choice = json.loads(told)["choices"][0]
            return choice.get("text") or choice["message"]["content"], "whole"
        parts = [part.removeprefix("data: ") for part in told.split("\n\n") if part]
        if parts[-1] != "[DONE]":
            return "", f"ended without [DONE]: {parts[-1][:200]}"
        events = [json.loads(part) for part in parts[:-1]]
        errors = [event for event in events if "choices" not in event]
        if errors:
            return "", f"error event: {errors[0]}"
        choices = [choice for event in events for choice in event["choices"]]
        reasons = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        if reasons != ["length"]:
            return "", f"finished {reasons}"
        return "".join(
            choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            for choice in choices
        ), "whole"


def said(choice: dict[str, Any]) -> str:
    """The text of one streamed choice."""
    return str(choice["delta"].get("content") or "" if "delta" in choice else choice["text"])


def frontend_spec(rig: Rig, port: int) -> FrontendSpec:
    return make_spec(
        port=port,
        registry=rig.control,
        membership=rig.membership,
        keys_file="keys.json",
        backend="mocker",
        model=ModelCard(name=MODEL, path=str(BUILTIN), max_model_len=8192),
        roles={"prefill": LEAST, "decode": LEAST},
        router=RouterSpec(mode="kv"),
        migration=MigrationSpec(limit=10),
        limits=LimitsSpec(request_timeout_s=DEADLINE_S * 0.9, first_byte_timeout_s=20, stall_timeout_s=20),
    )


async def start_frontend(rig: Rig, spec: FrontendSpec) -> asyncio.subprocess.Process:
    """The real process, its log in the run directory."""
    (rig.run_dir / "frontend-0.json").write_bytes(msgspec.json.encode(spec))
    env = {**os.environ, "DYNCTL_PROCESS": spec.id, "DYNCTL_INCARNATION": "1"}
    argv = [sys.executable, "-m", "dynctl.frontend", "--spec", "frontend-0.json"]
    with (rig.run_dir / "frontend-0.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(*argv, cwd=rig.run_dir, env=env, stderr=log)


async def churn(fleet: Fleet, clients: Clients, serving: asyncio.Task[None]) -> None:
    """Joins, kills and departures in step with the requests, all made when nine of ten have ended."""
    first = fleet.joined
    while not serving.done() and (fleet.joined < JOINS or sum(fleet.gone.values()) < KILLS):
        share = min(1.0, sum(clients.outcome.ends.values()) / (0.9 * REQUESTS))
        if fleet.joined < first + share * (JOINS - first):
            fleet.join(fleet.rng.choice(["prefill", "decode"]))
        gone = sum(fleet.gone.values())
        if gone < share * KILLS:
            (fleet.kill if gone % 2 else fleet.leave)()
        await asyncio.sleep(0.02)


@pytest.mark.timeout(300)
async def test_requests_survive_workers_that_come_and_go(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = Random(3)
    rig = Rig(tmp_path)
    port = free_port()
    process = await start_frontend(rig, frontend_spec(rig, port))
    try:
        with Nursery(tmp_path) as nursery:
            fleet = Fleet(rig, nursery, rng)
            for role in ("prefill", "decode"):
                for _ in range(2 * LEAST):
                    fleet.join(role)
            await until(lambda: len(rig.registry.members()) >= 4 * LEAST)
            await _until_healthy(port)
            clients = Clients(port, rng)
            serving = asyncio.create_task(clients.run(REQUESTS))
            await churn(fleet, clients, serving)
            async with asyncio.timeout(200):
                await serving
            await fleet.settled()
            state = await _settled(port)
        with capsys.disabled():
            print(  # noqa: T201 - the counts are the point of this test
                f"\nchurn: {dict(clients.outcome.ends)} of {REQUESTS}; joins {fleet.joined}, "
                f"gone {dict(fleet.gone)}; {state}"
            )
        assert clients.outcome.ends == {"whole": REQUESTS}, "\n".join(clients.outcome.wrong[:10])
        assert fleet.joined >= JOINS
        assert sum(fleet.gone.values()) >= KILLS
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await rig.close()


async def _until_healthy(port: int) -> None:
    client = Client()
    async with asyncio.timeout(30):
        while True:
            try:
                answer = await client.request(
                    Origin("http", "127.0.0.1", port), "GET", "/health", timeout_s=5
                )
                if answer.status == 200:
                    break
            except DynctlError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)
    await client.close()


async def _settled(port: int) -> str:
    """The frontend's counts of what went on, once nothing is in flight there any more."""
    client, origin = Client(), Origin("http", "127.0.0.1", port)
    async with asyncio.timeout(20):
        while True:
            page = (await client.request(origin, "GET", "/metrics", timeout_s=5)).body.decode()
            inflight = [line for line in page.splitlines() if line.startswith("dynctl_frontend_inflight")]
            if all(line.endswith(" 0.0") for line in inflight):
                break
            await asyncio.sleep(0.1)
    await client.close()
    wanted = ("retries_total", "model_migration_total", "handoffs_refused_total", "upstream_failures_total")
    counts: Counter[str] = Counter()
    for line in page.splitlines():
        name, _, value = line.rpartition(" ")
        for metric in wanted:
            if name.startswith(f"dynctl_frontend_{metric}"):
                counts[metric] += int(float(value))
    return str(dict(counts))
