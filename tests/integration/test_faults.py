"""Faults under many requests at once, with counts of what became of them (`pytest -s`).

Others are counted in test_churn, test_frontends, test_event_plane_faults and test_up_overload.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dynctl.errors import DynctlError
from dynctl.http.client import Client, Origin, Timeouts
from dynctl.http.heads import end_to_end
from dynctl.http.relay import relay
from dynctl.http.server import Exchange, Request
from dynctl.protocol.specs import LimitsSpec
from tests.contract.http_wire import Wire
from tests.deployment import Cli, Deployment, counter, end_all, get, up
from tests.integration.frontend_harness import (
    DEADLINE_S,
    Engine,
    Front,
    Script,
    answers,
    frontend,
    hangs,
    make_spec,
)
from tests.integration.mocker_process import MockerProcess
from tests.integration.steady_load import steady_load
from tests.integration.test_frontend_migration_mocker import MOCK_CHAT, MOCK_COMPLETION, mocked
from tests.integration.test_frontends import idle, until
from tests.integration.test_up_overload import engine_urls, post
from tests.unit import toy_engine as toy

VIOLATIONS = "dynctl_mocker_transfer_violations_total"
PATIENCE = Timeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)


def told(fault: str, counts: object) -> None:
    """The counts are what these tests are for."""
    sys.stdout.write(f"\n{fault}: {counts}\n")


def bodies(number: int) -> list[dict[str, Any]]:
    """Completions that differ, and have a few blocks each."""
    return [{**MOCK_COMPLETION, "prompt": f"Story {n}: once upon a time. " * 8} for n in range(number)]


async def texts(engine: MockerProcess, asked: list[dict[str, Any]]) -> list[str]:
    """What an engine that nothing happens to says."""
    told = await asyncio.gather(*(engine.post("/v1/completions", body) for body in asked))
    return [str(answer["choices"][0]["text"]) for answer in told]


async def end_of(front: Front, body: dict[str, Any], right: str) -> str:
    """How a stream ended, in a word."""
    payload = b""
    try:
        async with asyncio.timeout(3 * DEADLINE_S):
            async for piece in front.pieces("/v1/completions", {**body, "stream": True}):
                payload += piece
    except TimeoutError:
        return "hung"
    except DynctlError:
        return "lost"
    if not payload.startswith(b"data: "):
        return f"refused: {payload[:200]!r}"
    got = toy.read(payload)
    if got.errors or got.dones != 1:
        return "lost"
    return "whole" if got.text == right else "wrong text"


async def ends_of(front: Front, asked: list[dict[str, Any]], right: list[str], at_once: int) -> Counter[str]:
    """How all of them ended, so many at a time."""
    turns = asyncio.Semaphore(at_once)

    async def one(body: dict[str, Any], text: str) -> str:
        async with turns:
            return await end_of(front, body, text)

    return Counter(await asyncio.gather(*map(one, asked, right)))


# --- prefill and decode


def killing(decode: MockerProcess, prefills: list[MockerProcess], every: int, most: int) -> Script:
    """What passes requests on to `decode`, but first ends the prefill process that holds the blocks of it."""
    killed: list[MockerProcess] = []

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        port = json.loads(request.body)["kv_transfer_params"]["remote_port"]
        holder = next(process for process in prefills if process.origin.port == port)
        if len(engine.requests) % every == 0 and len(killed) < most and holder not in killed:
            killed.append(holder)
            holder.process.send_signal(signal.SIGKILL)
            await holder.process.wait()
        headers = end_to_end(request.headers)
        stream = await decode.client.open(
            decode.origin, "POST", request.path, headers=headers, body=request.body, timeouts=PATIENCE
        )
        await relay(stream, exchange)

    return script


async def test_prefill_killed_between_its_answer_and_decodes_pull() -> None:
    asked = bodies(60)
    async with mocked(prefill=4, decode=1) as (front, processes):
        right = await texts(processes["prefill"][0], asked)
        engine = Engine(killing(processes["decode"][0], processes["prefill"], every=12, most=3))
        await engine.start()
        front.join("decode", 0, engine.url, incarnation=2, model=front.spec.model)
        ends = await ends_of(front, asked, right, at_once=12)
        await front.idle()
        text = await front.metrics()
        killed = [process for process in processes["prefill"] if process.process.returncode is not None]
        in_vain = await processes["decode"][0].metric(VIOLATIONS, reason="unreachable")
        await engine.stop()
    retries = counter(text, "dynctl_frontend_retries_total")
    told(
        "prefill killed between its answer and decode's pull",
        f"{dict(ends)}; killed {len(killed)} of 4; {in_vain:g} pulls failed, {retries:g} retries",
    )
    assert ends == {"whole": len(asked)}
    assert len(killed) == 3
    assert retries >= in_vain >= len(killed)


async def test_decode_killed_twice_under_the_same_streams(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dynctl.frontend.migrate")
    asked = bodies(24)
    async with mocked(prefill=1, decode=3) as (front, processes):
        right = await texts(processes["prefill"][0], asked)
        asking = asyncio.create_task(ends_of(front, asked, right, at_once=len(asked)))
        for process in processes["decode"][:2]:
            await process.until(lambda state: state["running"] >= len(asked) // 4)
            await asyncio.sleep(0.1)
            process.process.send_signal(signal.SIGKILL)
            await process.process.wait()
        ends = await asking
        await front.idle()
    moves = Counter(re.findall(r"request\.migrated id=\S+ number=(\d)", caplog.text))
    told(
        "decode killed mid-stream, twice",
        f"{dict(ends)} of {len(asked)}; {moves['1']} streams moved, {moves['2']} of them twice",
    )
    assert ends == {"whole": len(asked)}
    assert moves["2"] > 0


# --- a worker that accepts and never answers


async def test_a_worker_that_accepts_and_never_answers() -> None:
    requests, limits = 96, LimitsSpec(first_byte_timeout_s=0.5, stall_timeout_s=0.5, request_timeout_s=5)
    mute = Engine(hangs)
    async with frontend(
        make_spec(limits=limits), aggregated=[mute, Engine(answers), Engine(answers)]
    ) as front:
        turns = asyncio.Semaphore(8)

        async def one(number: int) -> str:
            body = {"model": "m", "prompt": "hi", "stream": number % 2 == 0}
            async with turns:
                try:
                    response = await front.post("/v1/completions", body)
                except DynctlError as error:
                    return f"lost: {error.kind}"
            return "whole" if response.status == 200 else f"status {response.status}"

        ends = Counter(await asyncio.gather(*map(one, range(requests))))
        await front.idle()
    told(
        "one of three workers never answers",
        f"{dict(ends)} of {requests}; it was asked {mute.cancelled} times",
    )
    assert set(ends) <= {"whole", "status 504"}, "each ends by its deadline, answered or told so"
    assert ends["status 504"] == len(mute.requests) == mute.cancelled
    assert ends["whole"] >= 0.8 * requests, "it is left alone once it was late a few times"


# --- clients, as they should not be

RECIPE = {
    "schema": "dynctl/v1",
    "name": "faults",
    "model": {"path": "builtin:tiny", "served_name": "tiny"},
    "backend": "mocker",
    "engine": {"canary": {"interval": "1s", "timeout": "1s"}},
    "roles": {"prefill": {"replicas": 1}, "decode": {"replicas": 2}},
    "frontend": {
        "port": 0,
        "replicas": 2,
        "limits": {"header_timeout": "1s", "body_timeout": "1s", "body": "64KiB"},
    },
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    home = tmp_path_factory.mktemp("faults")
    recipe = Path(home) / "faults.yaml"
    recipe.write_text(json.dumps(RECIPE))
    with up(Cli(home / "home"), recipe) as deployment:
        yield deployment
    end_all(home / "home")


def engines_idle(urls: list[str]) -> bool:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return not any(counter(get(f"{url}/metrics"), name) for url in urls for name in names)


async def test_clients_that_disconnect_at_random_points(served: Deployment) -> None:
    rng, requests = Random(11), 300
    client, origin = Client(), Origin.parse(served.url)

    async def one(number: int) -> str:
        chat = number % 2 == 0
        body = {**(MOCK_CHAT if chat else MOCK_COMPLETION), "model": "tiny", "stream": number % 3 != 0}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        await asyncio.sleep(number * 0.01)
        try:
            async with asyncio.timeout(rng.uniform(0, 0.8)):
                stream = await client.open(
                    origin, "POST", path, body=json.dumps(body).encode(), timeouts=PATIENCE
                )
                answer = await stream.read(1 << 24)
        except TimeoutError:
            return "left"
        return "whole" if stream.status == 200 and b'"error"' not in answer else f"status {stream.status}"

    ends = Counter(await asyncio.gather(*map(one, range(requests))))
    await client.close()
    urls = engine_urls(served)
    assert len(urls) == 3
    await until(partial(idle, served))
    await until(partial(engines_idle, urls))
    seen = events_of(served, "model_cancellation_total")
    told(
        "clients disconnect at random points",
        f"{dict(ends)} of {requests}, {seen:g} seen to leave; then 0 in flight at 2 frontends and 3 engines",
    )
    assert set(ends) == {"left", "whole"}
    assert ends["left"] > requests / 4


def events_of(deployment: Deployment, name: str) -> float:
    """A counter, over all frontends."""
    pages = [get(f"{row['url']}/metrics") for row in deployment.workers("frontend")]
    return sum(counter(page, f"dynctl_frontend_{name}") for page in pages)


async def test_an_engine_that_accepts_and_answers_no_more_loses_nothing(served: Deployment) -> None:
    """Its canary finds out; who waits there is sent elsewhere, long before a deadline of theirs."""
    worker = served.workers("decode")[0]

    def state() -> str:
        return str(served.workers("decode")[0]["state"])

    async with steady_load(served.url, 12) as load:
        await until(lambda: load.answered() > 50)
        post(f"{worker['url']}/mock/faults", b'{"hang": true}')
        await until(lambda: state() == "silent")
        before = load.answered()
        await until(lambda: load.answered() > before + 50)
        post(f"{worker['url']}/mock/faults", b'{"hang": false}')
        await until(lambda: state() == "ready")
    retries, moves = events_of(served, "retries_total"), events_of(served, "model_migration_total")
    told("one of two decode engines answers no more", f"{load}; {retries:g} retries, {moves:g} migrations")
    assert (load.hung, load.wrong, load.broken.total()) == (0, [], 0)
    assert moves > 0
    await until(partial(idle, served))


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\n"
BAD: dict[str, tuple[bytes, int]] = {
    "slow head": (HEAD, 408),
    "slow body": (HEAD + b"Content-Length: 10\r\n\r\n{", 408),
    "head too large": (HEAD + b"X: " + b"a" * 40_000 + b"\r\n\r\n", 431),
    "body too large": (HEAD + b"Content-Length: 70000\r\n\r\n", 413),
    "malformed": (b"\0\x01 not HTTP\r\n\r\n", 400),
    "two lengths": (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "no JSON": (HEAD + b"Content-Length: 4\r\n\r\n{{{{", 400),
    "pipelined": (b"GET /live HTTP/1.1\r\nHost: h\r\n\r\n" * 5, 200),
}
EACH = 25


async def status_of(port: int, sent: bytes, number: int) -> list[int]:
    """The statuses that such a client gets, in order."""
    wire = await Wire.to(port)
    async with asyncio.timeout(DEADLINE_S):
        wire.send(sent)
        statuses = [(await wire.answer())[0] for _ in range(number)]
    await wire.close()
    return statuses


async def test_slow_oversized_malformed_and_pipelined_http_beside_good_clients(served: Deployment) -> None:
    port = int(served.url.rpartition(":")[2])
    async with steady_load(served.url, 8) as load:
        asked = [
            (kind, status_of(port, sent, 5 if kind == "pipelined" else 1))
            for kind, (sent, _) in BAD.items()
            for _ in range(EACH)
        ]
        found = await asyncio.gather(*(asking for _, asking in asked))
        before = load.answered()
        await until(lambda: load.answered() > before + 50)
    counts: Counter[str] = Counter()
    for (kind, _), statuses in zip(asked, found, strict=True):
        counts.update(f"{kind}: {status}" for status in statuses)
    told("slow, oversized, malformed, pipelined HTTP", f"{dict(counts)}; good clients beside: {load}")
    right = {
        f"{kind}: {status}": EACH * (5 if kind == "pipelined" else 1) for kind, (_, status) in BAD.items()
    }
    assert counts == right
    assert (load.hung, load.wrong, load.broken.total()) == (0, [], 0)
    await until(partial(idle, served))
