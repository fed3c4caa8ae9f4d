"""A frontend as a process: registry, membership, event plane, drain."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dynctl.http.client import Timeouts
from dynctl.http.server import Exchange, Request
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.exits import read_last_words
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import DEADLINE_S, Engine, sse, token
from tests.integration.frontend_plane import BLOCK, TOKENS, plane, two_engines


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with two_engines() as group:
        yield group


async def test_it_serves_registers_and_leaves_on_sigterm(tmp_path: Path, engines: list[Engine]) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.start(deployment.spec())
        await deployment.until(lambda response: response.status == 503)
        await deployment.join(0, engines[0])
        await deployment.until(lambda response: response.status == 200)
        response = await deployment.call("POST", "/v1/completions", {"model": "m", "prompt": "x"})
        assert response.status == 200
        await deployment.until(lambda _: deployment.member("frontend-0") is not None)
        member = deployment.member("frontend-0")
        assert member is not None
        assert (member.instance.incarnation, member.instance.role) == (3, "frontend")
        assert deployment.process is not None
        deployment.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0
        assert deployment.member("frontend-0") is None


async def test_sigterm_lets_a_running_stream_finish(tmp_path: Path, engines: list[Engine]) -> None:
    goes_on = asyncio.Event()

    async def waits(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        exchange.write(sse(token("a"))[0])
        await goes_on.wait()
        for event in sse(token("b", "stop")):
            exchange.write(event)
        exchange.end()

    engines[0].script = waits
    async with plane(tmp_path) as deployment:
        await deployment.join(0, engines[0])
        await deployment.start(deployment.spec())
        await deployment.until(lambda response: response.status == 200)
        body = json.dumps({"model": "m", "prompt": "x", "stream": True}).encode()
        timeouts = Timeouts(DEADLINE_S, DEADLINE_S, DEADLINE_S)
        stream = await deployment.client.open(
            deployment.origin, "POST", "/v1/completions", body=body, timeouts=timeouts
        )
        pieces = stream.iter_body()
        received = await anext(pieces)
        assert deployment.process is not None
        deployment.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", deployment.origin.port)
                except (ConnectionRefusedError, ConnectionResetError):  # reset: it was waiting at that moment
                    break
                writer.close()
                await writer.wait_closed()
        goes_on.set()
        received += b"".join([piece async for piece in pieces])
        assert received.endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0


async def test_kv_events_lead_a_prompt_to_the_worker_that_holds_it(
    tmp_path: Path, engines: list[Engine]
) -> None:
    hashes = sequence_hashes(TOKENS, BLOCK, root_hash())
    spec_fields: dict[str, Any] = {"router": RouterSpec(mode="kv")}
    async with plane(tmp_path) as deployment:
        await deployment.start(deployment.spec(**spec_fields))
        sidecars = [await deployment.join(i, engine, block_size=BLOCK) for i, engine in enumerate(engines)]
        await deployment.until(lambda response: json.loads(response.body)["doubts"] == [])
        sidecars[1].store(hashes[:5])
        sidecars[1].store(hashes[5:])
        wanted = b'router_kv_blocks{rank="0",worker="aggregated-1"} 10.0'
        await deployment.until(lambda response: wanted in response.body, "/metrics")
        for _ in range(5):
            response = await deployment.call("POST", "/v1/completions", {"model": "m", "prompt": TOKENS})
            assert dict(response.headers)[b"x-dynctl-workers"] == b"aggregated-1"
        assert engines[0].requests == []


async def test_too_long_a_prompt_is_400_before_the_stream_opens(
    tmp_path: Path, engines: list[Engine]
) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.start(deployment.spec(router=RouterSpec(mode="kv")))
        await deployment.join(0, engines[0], block_size=BLOCK, max_model_len=50)
        await deployment.until(lambda response: response.status == 200)
        body = {"model": "m", "prompt": TOKENS, "max_tokens": 11, "stream": True}
        response = await deployment.call("POST", "/v1/completions", body)
        assert response.status == 400
        assert json.loads(response.body)["error"]["code"] == "context_length_exceeded"
        fits = {**body, "max_tokens": 10}
        assert (await deployment.call("POST", "/v1/completions", fits)).status == 200
    assert len(engines[0].requests) == 1


async def test_traffic_goes_on_while_the_registry_is_away(tmp_path: Path, engines: list[Engine]) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.join(0, engines[0])
        await deployment.start(deployment.spec())
        await deployment.until(lambda response: response.status == 200)
        await deployment.registry.close()
        await deployment.control.close()
        deployment.publisher.close()
        for _ in range(3):
            response = await deployment.call("POST", "/v1/completions", {"model": "m", "prompt": "x"})
            assert response.status == 200
        assert deployment.process is not None
        deployment.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0


async def test_a_taken_port_is_told_with_last_words(tmp_path: Path) -> None:
    async with plane(tmp_path) as deployment:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            await deployment.start(deployment.spec(port=taken.getsockname()[1]))
            assert deployment.process is not None
            _, errors = await asyncio.wait_for(deployment.process.communicate(), DEADLINE_S * 2)
        assert deployment.process.returncode == 1
        words = read_last_words(tmp_path, "frontend-0", 3)
        assert words is not None
        assert words.kind == "port_in_use"
        assert b"Traceback" not in errors


async def test_a_superseded_frontend_ends(tmp_path: Path) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.start(deployment.spec())
        await deployment.until(lambda _: deployment.member("frontend-0") is not None)
        deployment.registry.set_current("frontend-0", 4)
        assert deployment.process is not None
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 1


async def test_a_certificate_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.start(deployment.spec(tls_cert="missing.pem", tls_key="missing.key"))
        assert deployment.process is not None
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S * 2) == 1
        words = read_last_words(tmp_path, "frontend-0", 3)
        assert words is not None
        assert "missing.pem" in words.message
