"""SIGTERM on a frontend: it takes nothing more, says so, lets requests end, tells those that could not."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dynctl.http.client import Timeouts
from dynctl.http.server import Exchange, Request
from tests.integration.frontend_harness import DEADLINE_S, Engine, frontend, hangs, make_spec, sse, token
from tests.integration.frontend_plane import plane, two_engines

pytestmark = pytest.mark.usefixtures("each_relay")


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with two_engines() as group:
        yield group


async def begins_and_hangs(engine: Engine, request: Request, exchange: Exchange) -> None:
    """One token, then nothing; whole answers hang from the start."""
    if json.loads(request.body).get("stream"):
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(sse(token("a"))[0])
    await hangs(engine, request, exchange)


async def takes_connections(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except (ConnectionRefusedError, ConnectionResetError):  # Reset: it waited when the listener was closed.
        return False
    writer.close()
    await writer.wait_closed()
    return True


async def test_what_has_not_ended_at_the_deadline_is_told_and_not_cut(
    tmp_path: Path, engines: list[Engine]
) -> None:
    engines[0].script = begins_and_hangs
    async with plane(tmp_path) as deployment:
        await deployment.join(0, engines[0])
        await deployment.start(msgspec.structs.replace(deployment.spec(), drain_timeout_s=0.3))
        await deployment.until(lambda response: response.status == 200)
        assert deployment.process is not None
        timeouts = Timeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)
        body = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
        stream = await deployment.client.open(
            deployment.origin, "POST", "/v1/completions", body=body, timeouts=timeouts
        )
        whole = asyncio.create_task(deployment.call("POST", "/v1/completions", {"model": "m", "prompt": "x"}))
        await engines[0].wait(lambda: len(engines[0].requests) == 2)
        deployment.process.send_signal(signal.SIGTERM)
        events = b"".join([piece async for piece in stream.iter_body()]).split(b"\n\n")
        refused = await whole
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0
    last = json.loads(events[-2].removeprefix(b"data: "))
    assert "stopping" in last["error"]["message"]
    assert (refused.status, json.loads(refused.body)["error"]["type"]) == (503, "service_unavailable")


async def test_a_connection_that_is_kept_hears_that_it_ends(tmp_path: Path, engines: list[Engine]) -> None:
    goes_on = asyncio.Event()

    async def waits(engine: Engine, request: Request, exchange: Exchange) -> None:
        await goes_on.wait()
        exchange.respond(200, b"{}")

    engines[0].script = waits
    async with plane(tmp_path) as deployment:
        await deployment.join(0, engines[0])
        await deployment.start(deployment.spec())
        await deployment.until(lambda response: response.status == 200)
        assert deployment.process is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", deployment.origin.port)
        body = b'{"model":"m","prompt":"x"}'
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await engines[0].wait(lambda: len(engines[0].requests) == 1)
        deployment.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            while await takes_connections(deployment.origin.port):
                pass
        goes_on.set()
        answer = await asyncio.wait_for(reader.read(), DEADLINE_S)
        writer.close()
        await writer.wait_closed()
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"\r\nconnection: close\r\n" in answer.lower()


async def test_a_frontend_that_stops_is_not_ready() -> None:
    """Whoever balances load before it must take it out before it is gone."""
    async with frontend(make_spec(), aggregated=[Engine()]) as front:
        assert (await front.call("GET", "/health")).status == 200
        front.core.drain()
        response = await front.call("GET", "/health")
    told = json.loads(response.body)
    assert (response.status, told["status"], told["reasons"]) == (
        503,
        "draining",
        ["this frontend is stopping"],
    )
