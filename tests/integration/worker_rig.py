"""A sidecar as a real process in a run directory, with a registry to speak to."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dynctl.discovery.registry import Registry
from dynctl.protocol.exits import LastWords, read_last_words
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC, KvBatch, KvSync, KvSyncReply, LoadReport
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import EngineProcess, WorkerSpec
from dynctl.transport.control import ControlClient, ControlServer
from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys

ENGINE = Path(__file__).with_name("worker_engine.py")


async def until(condition: Callable[[], bool], deadline_s: float = 20) -> None:
    """Poll until it holds."""
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110 - the condition has no event to wait for
            await asyncio.sleep(0.01)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def alive(pid: int) -> bool:
    """Runs, and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


class Rig:
    """One registry, any number of sidecars."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.keys = Keys.generate()
        self.keys.save(run_dir / "keys.json")
        self._publisher = Publisher(self.keys, "tcp://127.0.0.1:0")
        self.membership = self._publisher.start()
        self.registry = Registry(self._publisher, ttl_s=3)
        self._server = ControlServer(self.keys, "tcp://127.0.0.1:0", self.registry.handle)
        self.control = self._server.start()
        self.registry.start()
        self.port = free_port()
        self._started: list[subprocess.Popen[bytes]] = []

    def engine(self, *flags: str) -> EngineProcess:
        return EngineProcess(argv=[sys.executable, str(ENGINE), "--port", str(self.port), *flags])

    def spec(self, **changes: Any) -> WorkerSpec:
        spec = WorkerSpec(
            id="decode-0",
            role="decode",
            index=0,
            node="n",
            backend="external",
            model=ModelCard(name="m"),
            url=f"http://127.0.0.1:{self.port}",
            registry=self.control,
            keys_file="keys.json",
            bind_host="127.0.0.1",
            events_port=0,
            control_port=0,
            engine=self.engine(),
            engine_log="logs/decode-0.engine.log",
            start_timeout_s=20,
            drain_timeout_s=10,
            stop_timeout_s=5,
        )
        return msgspec.structs.replace(spec, **changes)

    def start(self, spec: WorkerSpec, incarnation: int = 1) -> subprocess.Popen[bytes]:
        path = self.run_dir / f"{spec.id}.{incarnation}.json"
        path.write_bytes(msgspec.json.encode(spec))
        environment = {
            **os.environ,
            "DYNCTL_RUN": f"test-{self.run_dir}",
            "DYNCTL_PROCESS": spec.id,
            "DYNCTL_INCARNATION": str(incarnation),
        }
        with (self.run_dir / f"{spec.id}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dynctl.worker", "--spec", str(path)],
                cwd=self.run_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def member(self) -> Member | None:
        return next(iter(self.registry.members()), None)

    async def ready(self) -> Instance:
        """Wait until one is registered."""
        await until(lambda: self.member() is not None)
        member = self.member()
        assert member is not None
        return member.instance

    def log(self, seat: str = "decode-0") -> str:
        return (self.run_dir / f"{seat}.log").read_text()

    def words(self, incarnation: int = 1, seat: str = "decode-0") -> LastWords:
        words = read_last_words(self.run_dir, seat, incarnation)
        assert words is not None, self.log(seat)
        return words

    async def exit_code(self, process: subprocess.Popen[bytes]) -> int:
        await until(lambda: process.poll() is not None, 30)
        return int(process.returncode)

    async def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        await self._server.close()
        await self.registry.close()
        self._publisher.close()


class Reader:
    """A frontend's end of the event plane."""

    def __init__(self, rig: Rig, instance: Instance) -> None:
        self.batches: list[KvBatch] = []
        self.loads: list[LoadReport] = []
        self._client = ControlClient(rig.keys, instance.control)
        self._subscriber = Subscriber(rig.keys, self._receive)
        self._subscriber.connect(instance.events)

    def _receive(self, topic: bytes, body: bytes) -> None:
        if topic == KV_TOPIC:
            self.batches.append(msgspec.msgpack.decode(body, type=KvBatch))
        elif topic == LOAD_TOPIC:
            self.loads.append(msgspec.msgpack.decode(body, type=LoadReport))

    async def sync(self, from_seq: int, rank: int = 0) -> KvSyncReply:
        return await self._client.call("kv.sync", KvSync(rank=rank, from_seq=from_seq), KvSyncReply, 5)

    async def sync_until(self, from_seq: int, condition: Callable[[KvSyncReply], bool]) -> KvSyncReply:
        async with asyncio.timeout(10):
            while not condition(reply := await self.sync(from_seq)):  # noqa: ASYNC110 - over a socket
                await asyncio.sleep(0.02)
        return reply

    async def call(self, op: str, body: msgspec.Struct | None) -> None:
        await self._client.call(op, body, KvSyncReply, 5)

    def close(self) -> None:
        self._client.close()
        self._subscriber.close()
