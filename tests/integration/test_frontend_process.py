"""A frontend as a process: registry, membership, event plane, drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.discovery.registry import Registry
from dynctl.errors import PeerLost
from dynctl.http.client import Client, Origin, Response, Timeouts
from dynctl.http.server import Exchange, Request
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.exits import read_last_words
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, KvBatch, KvSync, KvSyncReply, Stored
from dynctl.protocol.registry import Member, Register
from dynctl.protocol.specs import FrontendSpec, RouterSpec
from dynctl.transport.control import ControlServer, read_body
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from tests.integration.frontend_harness import DEADLINE_S, Engine, make_spec, sse, token

ANY_PORT = "tcp://127.0.0.1:0"
BLOCK = 4
TOKENS = list(range(100, 140))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Plane:
    """A registry and the sidecars of workers, in this process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.keys = Keys.generate()
        self.keys.save(run_dir / "keys.json")
        self.publisher = Publisher(self.keys, ANY_PORT)
        self.membership = self.publisher.start()
        self.registry = Registry(self.publisher)
        self.control = ControlServer(self.keys, ANY_PORT, self.registry.handle)
        self.registry_endpoint = self.control.start()
        self.registry.start()
        self.sidecars: list[Sidecar] = []
        self.process: asyncio.subprocess.Process | None = None
        self.client = Client()

    def spec(self, **fields: Any) -> FrontendSpec:
        return make_spec(
            **{
                "port": free_port(),
                "registry": self.registry_endpoint,
                "membership": self.membership,
                "keys_file": "keys.json",
                **fields,
            }
        )

    async def start(self, spec: FrontendSpec) -> None:
        (self.run_dir / "frontend-0.json").write_bytes(msgspec.json.encode(spec))
        self.origin = Origin("http", "127.0.0.1", spec.port)
        env = {**os.environ, "DYNCTL_PROCESS": spec.id, "DYNCTL_INCARNATION": "3"}
        argv = [sys.executable, "-m", "dynctl.frontend", "--spec", "frontend-0.json"]
        self.process = await asyncio.create_subprocess_exec(
            *argv, cwd=self.run_dir, env=env, stderr=asyncio.subprocess.PIPE
        )

    async def join(self, index: int, engine: Engine, **card: Any) -> Sidecar:
        sidecar = Sidecar(self.keys, index, engine, card)
        self.sidecars.append(sidecar)
        call = Register(instance=sidecar.instance)
        await self.registry.handle("registry.register", msgspec.Raw(msgspec.msgpack.encode(call)))
        return sidecar

    async def call(self, method: str, path: str, body: Any = None) -> Response:
        data = b"" if body is None else json.dumps(body).encode()
        return await self.client.request(self.origin, method, path, body=data, timeout_s=DEADLINE_S)

    async def until(self, condition: Callable[[Response], bool], path: str = "/health") -> Response:
        """Poll a page until it is as wanted."""
        async with asyncio.timeout(DEADLINE_S * 2):
            while True:
                assert self.process is not None
                assert self.process.returncode is None
                try:
                    response = await self.call("GET", path)
                    if condition(response):
                        return response
                except PeerLost:
                    pass  # it does not listen yet
                await asyncio.sleep(0.02)

    def member(self, id_: str) -> Member | None:
        return next((one for one in self.registry.members() if one.instance.id == id_), None)

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self.client.close()
        await self.registry.close()
        await self.control.close()
        self.publisher.close()
        for sidecar in self.sidecars:
            await sidecar.stop()
        await asyncio.sleep(0.01)


class Sidecar:
    """What a worker's sidecar shows to frontends: numbered KV events and the answer to "kv.sync"."""

    def __init__(self, keys: Keys, index: int, engine: Engine, card: dict[str, Any]) -> None:
        self.publisher = Publisher(keys, ANY_PORT)
        self.control = ControlServer(keys, ANY_PORT, self._handle)
        self.batches: list[KvBatch] = []
        self.instance = Instance(
            id=f"aggregated-{index}",
            incarnation=1,
            role="aggregated",
            index=index,
            node="n",
            pid=1,
            started_at=0.0,
            url=engine.url,
            model=ModelCard(name="m", **card),
            events=self.publisher.start(),
            control=self.control.start(),
        )

    def store(self, hashes: list[int]) -> None:
        batch = KvBatch(
            worker=self.instance.id,
            incarnation=1,
            rank=0,
            seq=len(self.batches),
            events=[Stored(hashes)],
            block_size=BLOCK,
        )
        self.batches.append(batch)
        self.publisher.publish(KV_TOPIC, batch)

    async def _handle(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        asked = read_body(body, KvSync)
        return KvSyncReply(
            incarnation=1,
            rank=asked.rank,
            next_seq=len(self.batches),
            batches=self.batches[asked.from_seq :],
            block_size=BLOCK,
        )

    async def stop(self) -> None:
        self.publisher.close()
        await self.control.close()


@asynccontextmanager
async def plane(run_dir: Path) -> AsyncIterator[Plane]:
    there = Plane(run_dir)
    try:
        yield there
    finally:
        await there.stop()


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    group = [Engine(), Engine()]
    for engine in group:
        await engine.start()
    yield group
    for engine in group:
        await engine.stop()


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
                except ConnectionRefusedError:
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
