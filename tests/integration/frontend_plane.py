"""A frontend as a process, with the registry and the workers' sidecars in the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from dynctl.discovery.registry import Registry
from dynctl.errors import PeerLost
from dynctl.http.client import Client, Origin, Response
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, KvBatch, KvEvent, KvSync, KvSyncReply, Removed, Stored
from dynctl.protocol.registry import Member, Register, Renew
from dynctl.protocol.specs import FrontendSpec
from dynctl.transport.control import ControlServer, read_body
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from tests.integration.frontend_harness import DEADLINE_S, Engine, make_spec
from tests.workers import worker_instance

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
        self.asked, self.speaks = asyncio.Event(), asyncio.Event()
        self.speaks.set()
        self.control = ControlServer(self.keys, ANY_PORT, self._answer)
        self.registry_endpoint = self.control.start()
        self.registry.start()
        self.sidecars: list[Sidecar] = []
        self.process: asyncio.subprocess.Process | None = None
        self.client = Client()
        self._renewing: asyncio.Task[None] | None = None

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

    async def _answer(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        """The registry's, when `speaks` is set."""
        self.asked.set()
        await self.speaks.wait()
        return await self.registry.handle(op, body)

    async def start(self, spec: FrontendSpec, incarnation: int = 3) -> None:
        (self.run_dir / "frontend-0.json").write_bytes(msgspec.json.encode(spec))
        self.origin = Origin("http", "127.0.0.1", spec.port)
        env = {**os.environ, "DYNCTL_PROCESS": spec.id, "DYNCTL_INCARNATION": str(incarnation)}
        argv = [sys.executable, "-m", "dynctl.frontend", "--spec", "frontend-0.json"]
        self.process = await asyncio.create_subprocess_exec(
            *argv, cwd=self.run_dir, env=env, stderr=asyncio.subprocess.PIPE
        )

    async def join(
        self, index: int, engine: Engine, through: Callable[[str], str] | None = None, **card: Any
    ) -> Sidecar:
        """A worker comes. `through`: frontends hear its events at what this makes of their endpoint."""
        sidecar = Sidecar(self.keys, index, engine, card)
        self.sidecars.append(sidecar)
        if through is not None:
            events = through(sidecar.instance.events)
            sidecar.instance = msgspec.structs.replace(sidecar.instance, events=events)
        await self.tell("registry.register", Register(instance=sidecar.instance))
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
        return sidecar

    async def _renew(self) -> None:
        """Keep the leases of all who have not left."""
        while True:
            await asyncio.sleep(1.0)
            for sidecar in self.sidecars:
                instance = sidecar.instance
                await self.tell("registry.renew", Renew(id=instance.id, incarnation=instance.incarnation))

    async def tell(self, op: str, call: msgspec.Struct) -> None:
        """A call to the registry."""
        await self.registry.handle(op, msgspec.Raw(msgspec.msgpack.encode(call)))

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
        if self._renewing is not None:
            self._renewing.cancel()
        await self.registry.close()
        await self.control.close()
        self.publisher.close()
        for sidecar in self.sidecars:
            await sidecar.stop()
        await asyncio.sleep(0.01)


class Sidecar:
    """What a worker's sidecar shows to frontends: numbered KV events and the answer to "kv.sync".

    It answers when `answers` is set: from the last `keeps` batches if that will do, else with all it `held`.
    """

    keeps = 1000

    def __init__(self, keys: Keys, index: int, engine: Engine, card: dict[str, Any]) -> None:
        self.publisher = Publisher(keys, ANY_PORT)
        self.control = ControlServer(keys, ANY_PORT, self._handle)
        self.batches: list[KvBatch] = []
        self.held: set[int] = set()
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.instance = worker_instance(
            index,
            id=f"aggregated-{index}",
            url=engine.url,
            model=ModelCard(name="m", **card),
            events=self.publisher.start(),
            control=self.control.start(),
        )

    def store(self, hashes: list[int]) -> None:
        self.held.update(hashes)
        self._publish(Stored(hashes))

    def remove(self, hashes: list[int]) -> None:
        self.held.difference_update(hashes)
        self._publish(Removed(hashes))

    def beat(self) -> None:
        """Say the last batch again, so that losing it shows."""
        self.publisher.publish(KV_TOPIC, self.batches[-1])

    def _publish(self, event: KvEvent) -> None:
        batch = KvBatch(
            worker=self.instance.id,
            incarnation=1,
            rank=0,
            seq=len(self.batches),
            events=[event],
            block_size=BLOCK,
        )
        self.batches.append(batch)
        self.publisher.publish(KV_TOPIC, batch)

    async def _handle(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        asked = read_body(body, KvSync)
        self.asked.set()
        await self.answers.wait()
        kept = asked.from_seq >= len(self.batches) - self.keeps
        return KvSyncReply(
            incarnation=1,
            rank=asked.rank,
            next_seq=len(self.batches),
            batches=self.batches[asked.from_seq :] if kept else [],
            snapshot=None if kept else [Stored(list(self.held))],
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


@asynccontextmanager
async def two_engines() -> AsyncIterator[list[Engine]]:
    """Two engines that answer."""
    group = [Engine(), Engine()]
    for engine in group:
        await engine.start()
    try:
        yield group
    finally:
        for engine in group:
            await engine.stop()
