"""The sidecar's side towards the deployment: its sockets, its lease, its relays."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import msgspec

from dynctl.discovery.client import Registrar
from dynctl.engines.base import Engine, EngineLoad
from dynctl.errors import DynctlError, UsageError
from dynctl.protocol.handover import Become
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC, KvBatch, KvSync
from dynctl.protocol.specs import WorkerSpec
from dynctl.transport.control import ControlClient, ControlServer, read_body
from dynctl.transport.engine_events import EngineEventSource
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from dynctl.worker.adapters import Adapters
from dynctl.worker.canary import CanaryRun
from dynctl.worker.kv_poll import KvPoller
from dynctl.worker.kv_relay import KvRelay, RankMemory
from dynctl.worker.load import report_load, report_of
from dynctl.worker.readiness import Probe, Ready

logger = logging.getLogger(__name__)

_BEAT_S = 1.0
_LEAVE_DEADLINE_S = 0.5


@dataclass(frozen=True, slots=True)
class Attached:
    """A ready engine: what it said of itself, and its pid (0 = not our child)."""

    ready: Ready
    engine_pid: int


class Planes:
    """Opened once per sidecar; an engine is attached and detached. Use inside a running loop.

    `on_become` takes the wish that the sidecar become another seat's, or raises UsageError.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        incarnation: int,
        engine: Engine,
        probe: Probe,
        on_become: Callable[[Become], None],
    ) -> None:
        self._on_become = on_become
        self._spec = spec
        self._incarnation = incarnation
        self._probe = probe
        self._engine = engine
        keys = Keys.load(spec.keys_file)
        self._publisher = Publisher(keys, f"tcp://{spec.bind_host}:{spec.events_port}")
        self._server = ControlServer(keys, f"tcp://{spec.bind_host}:{spec.control_port}", self._answer)
        self._client = ControlClient(keys, spec.registry)
        self._new_reader = partial(engine.kv_reader, spec.kv_poll.block_size if spec.kv_poll else 0)
        self._relay = KvRelay(
            spec.id,
            incarnation,
            sources_of(spec),
            polled=spec.kv_poll is not None,
            new_reader=self._new_reader,
            publish=self._publish_kv,
        )
        self._adapters = Adapters(self._client, engine.lora, probe.post, self._adapters_changed)
        self._instance_now: Instance | None = None
        self._registrar: Registrar | None = None
        self._draining = False
        self._silences: set[str] = set()
        self._canary: CanaryRun | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._events = self._control = ""

    def open(self) -> None:
        """Bind the sockets. Raises PortInUse."""
        host = urlsplit(self._spec.url).hostname or self._spec.bind_host
        self._events = reachable(self._publisher.start(), host)
        self._control = reachable(self._server.start(), host)

    async def equip(self, ready: Ready) -> None:
        """Load what adapters the deployment has, before an engine is attached and gets requests."""
        self._adapters.attach(ready.adapters)
        try:
            await self._adapters.sync()
        except DynctlError as error:
            logger.warning("adapters.unheard id=%s error=%s", self._spec.id, error)

    def kv_memory(self) -> list[RankMemory]:
        """See `KvRelay.memory`."""
        return self._relay.memory()

    def recall_kv(self, memories: list[RankMemory]) -> None:
        """See `KvRelay.recall`; before `attach`."""
        self._relay.recall(memories)

    def attach(self, engine: Attached, on_superseded: Callable[[], None]) -> None:
        """Serve an engine: relay its events and load, take the lease."""
        self._relay.attach(engine.ready.info.block_size)
        loop = asyncio.get_running_loop()
        self._silences.clear()
        self._tasks = [
            loop.create_task(
                report_load(self._probe, self._publish_load, partial(self._silent, "load")), name="load"
            ),
            loop.create_task(self._beat(), name="beat"),
            loop.create_task(self._adapters.keep(), name="adapters"),
        ]
        if self._spec.kv_poll is not None:
            poller = KvPoller(self._probe.origin, self._spec.kv_poll, self._new_reader, self._relay)
            self._tasks.append(loop.create_task(poller.run(), name="kv_poll"))
        if self._spec.canary_interval_s:
            self._canary = CanaryRun(
                self._generates,
                self._spec.dp_size,
                self._spec.canary_interval_s,
                partial(self._silent, "generation"),
            )
            self._tasks.append(loop.create_task(self._canary.run(), name="canary"))
        for task in self._tasks:
            task.add_done_callback(_log_failure)
        self._instance_now = self._with_adapters(self._instance(engine), self._adapters.held)
        self._registrar = Registrar(self._client, self._instance_now, on_superseded=on_superseded)
        self._registrar.start()

    async def drain(self) -> bool:
        """Have no new requests sent here; True when the registry has heard."""
        self._draining = True
        return self._registrar is not None and await self._registrar.set_state("draining")

    async def _adapters_changed(self, held: list[str]) -> None:
        if self._instance_now is not None and self._registrar is not None:
            self._instance_now = self._with_adapters(self._instance_now, held)
            await self._registrar.update(self._instance_now)

    def _with_adapters(self, instance: Instance, held: list[str]) -> Instance:
        names = list(dict.fromkeys((*self._spec.model.adapters, *held)))
        card = msgspec.structs.replace(instance.model or self._spec.model, adapters=names)
        return msgspec.structs.replace(instance, model=card)

    async def _silent(self, what: str, silent: bool) -> None:
        """No new requests while the engine does not answer: its load, or requests (`what`)."""
        told = "silent" if silent else "answers_again"
        logger.warning("engine.%s id=%s what=%s", told, self._spec.id, what)
        before = bool(self._silences)
        (self._silences.add if silent else self._silences.discard)(what)
        now = bool(self._silences)
        if now != before and self._registrar is not None and not self._draining:
            await self._registrar.set_state("silent" if now else "ready")

    async def _generates(self, rank: int | None) -> str:
        """Not while it drains: it may refuse then, and must come to rest."""
        if self._draining:
            return ""
        canary = self._engine.canary(self._spec.model.name, self._spec.role)
        return await self._probe.generates(canary, rank, self._spec.canary_timeout_s)

    async def detach(self, reason: str) -> None:
        """The engine has ended, or is to be ended: give the lease back, stop relaying."""
        if self._registrar is not None:
            await self._registrar.leave(reason, _LEAVE_DEADLINE_S)
        await self._stop_serving()

    async def close(self) -> None:
        """Stop serving without a word and close the sockets."""
        await self._stop_serving()
        self._client.close()
        await self._server.close()
        self._publisher.close()

    async def _stop_serving(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._registrar is not None:
            await self._registrar.close()
            self._registrar = None
        self._instance_now = None
        self._relay.detach()

    async def _answer(self, op: str, body: msgspec.Raw) -> msgspec.Struct | None:
        if op == "worker.become":
            self._on_become(read_body(body, Become))
            return None
        if op == "adapters.sync":
            return await self._adapters.sync()
        if op != "kv.sync":
            raise UsageError(
                f"unknown op {op!r}", where=self._spec.id, hint="kv.sync, adapters.sync, worker.become"
            )
        return self._relay.sync(read_body(body, KvSync))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT_S)
            self._relay.beat()

    def _publish_kv(self, batch: KvBatch) -> None:
        self._publisher.publish(KV_TOPIC, batch)

    def _publish_load(self, load: EngineLoad) -> None:
        if self._canary is not None:
            self._canary.load(load)
        self._publisher.publish(LOAD_TOPIC, report_of(self._spec.id, self._incarnation, load))

    def _instance(self, engine: Attached) -> Instance:
        spec = self._spec
        return Instance(
            id=spec.id,
            incarnation=self._incarnation,
            role=spec.role,
            index=spec.index,
            node=spec.node,
            pid=os.getpid(),
            started_at=time.time(),
            url=spec.url,
            engine_pid=engine.engine_pid,
            backend=spec.backend,
            model=card_of(spec.model, engine.ready),
            dp_size=spec.dp_size,
            events=self._events,
            kv_events=bool(spec.kv_endpoints or spec.kv_poll),
            control=self._control,
            bootstrap_port=spec.bootstrap_port,
            peers=list(engine.ready.peers),
            engine_version=engine.ready.version,
        )


def card_of(model: ModelCard, ready: Ready) -> ModelCard:
    """The recipe's card of the model with what the engine itself says in place of what was assumed."""
    return msgspec.structs.replace(
        model,
        block_size=ready.info.block_size or model.block_size,
        max_model_len=ready.info.max_model_len or model.max_model_len,
        adapters=list(dict.fromkeys((*model.adapters, *ready.adapters))),
    )


def sources_of(spec: WorkerSpec) -> list[EngineEventSource]:
    """The engine's publishers by rank."""
    replay = [*spec.kv_replay_endpoints, *[""] * len(spec.kv_endpoints)]
    return [
        EngineEventSource(endpoint=endpoint, replay=replay[rank], topic=spec.kv_topic)
        for rank, endpoint in enumerate(spec.kv_endpoints)
    ]


def reachable(endpoint: str, host: str) -> str:
    """A bound endpoint as others dial it: `host` in place of a wildcard address."""
    address, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return f"tcp://{host}:{port}" if address in ("0.0.0.0", "*", "[::]") else endpoint


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("task.failed name=%s", task.get_name(), exc_info=error)
