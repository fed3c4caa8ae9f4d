"""A frontend process: follows the membership, serves HTTP, drains when told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import ssl
import time
from collections.abc import Coroutine
from dataclasses import dataclass

import msgspec

from dynctl.discovery.client import Registrar, Watcher
from dynctl.errors import LaunchError, Rejected, Superseded, TransportError
from dynctl.frontend.core import Core
from dynctl.frontend.links import Links
from dynctl.frontend.lora import AdapterActions, Ways
from dynctl.frontend.peers import PeerTalk
from dynctl.frontend.shared_port import require_own
from dynctl.http import certificate
from dynctl.http.server import Limits, Server, serve
from dynctl.native import load
from dynctl.protocol.adapters import AdapterList
from dynctl.protocol.inflight import INFLIGHT_TOPIC
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.transport.control import ControlClient
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

FIRST_VIEW_S = 1.0
VIEW_S = 5.0
LEAVE_S = 1.0
IDLE_S = 1.0
LIST_S = 2.0


@dataclass(slots=True)
class Ending:
    """Why a frontend ends: asked to, or because another holds its seat."""

    event: asyncio.Event
    superseded: bool = False

    def asked(self) -> None:
        """End in good order."""
        self.event.set()

    def replaced(self) -> None:
        """A newer incarnation is there."""
        self.superseded = True
        self.event.set()


class Frontend:
    """The parts of one frontend process, from `start` to `stop`."""

    def __init__(self, spec: FrontendSpec, incarnation: int, ending: Ending) -> None:
        self._spec = spec
        self._incarnation = incarnation
        keys = Keys.load(spec.keys_file)
        topics = (KV_TOPIC, LOAD_TOPIC) if spec.router.mode == "kv" else (LOAD_TOPIC,)
        several = bool(spec.events_port)
        self._links = Links(keys, (*topics, INFLIGHT_TOPIC) if several else topics)
        self.core = Core(spec, self._links.worker_links())
        self._links.attach(self.core.router)
        peers, subscriber = self.core.router.peers, self._links.subscriber
        self._talk = PeerTalk(keys, spec, incarnation, peers, subscriber) if several else None
        self._registry = ControlClient(keys, spec.registry)
        self._watcher = Watcher(
            keys,
            self._registry,
            spec.membership,
            on_change=self._members_changed,
            on_wanted=self.core.wanted_changed,
            on_planned=self.core.planned,
        )
        self._serve_adapters()
        self._ending = ending
        self._registrar: Registrar | None = None
        self._servers: list[Server] = []
        self._tls: ssl.SSLContext | None = None

    async def start(self) -> int:
        """Follow the membership, listen, register. Returns the port. Raises PortInUse, LaunchError."""
        self.core.warm()
        events = self._talk.start() if self._talk is not None else ""
        self._watcher.start()
        await self._know_workers()
        await self._listen()
        servers, port = self._servers, self._servers[-1].port
        self.core.metrics.gauge("connections").read = lambda: float(sum(one.connections for one in servers))
        self._registrar = Registrar(
            self._registry, self._instance(servers[0].port, events), on_superseded=self._ending.replaced
        )
        self._registrar.start()
        return port

    async def _know_workers(self) -> None:
        """Know the members, and what the ready workers hold, before anybody can send requests here.

        Alone, a frontend that says that it knows no worker is more help than none that answers. One of
        several leaves the requests to those who know.
        """
        loop = asyncio.get_running_loop()
        began = loop.time()
        if self._talk is None:
            await self._watcher.synced(FIRST_VIEW_S)
        else:
            while not await self._watcher.synced(VIEW_S, complete=self._incarnation > 1):
                logger.warning("frontend.waiting what=membership seconds=%.0f", loop.time() - began)
        behind = await self.core.router.caught_up(self._spec.sync_timeout_s)
        for worker, rank in behind:
            logger.warning("frontend.unsynced worker=%s rank=%d: by load only until it is", worker, rank)
        metrics = self.core.metrics
        metrics.gauge("start_wait_seconds").set(loop.time() - began)
        metrics.gauge("start_unsynced_ranks").set(len(behind))

    async def _listen(self) -> None:
        """Open the public port; where that is shared, one of its own before."""
        spec, shared = self._spec, bool(self._spec.own_port)
        self._tls = tls = _tls(spec)
        if shared:
            require_own(spec.host, spec.port)
        for port in (spec.own_port, spec.port) if shared else (spec.port,):
            server = await serve(
                self.core.routes,
                host=spec.host,
                port=port,
                limits=_limits(spec),
                tls=tls,
                reuse_port=shared and port == spec.port,
            )
            server.on_refused = self.core.http_refused
            self._servers.append(server)
            if shared and port == spec.port:
                require_own(spec.host, port)

    def renew(self) -> None:
        """From the next connection on use the certificate that is in the files now; not one that is bad."""
        spec = self._spec
        if self._tls is None:
            return
        try:
            certificate.load(self._tls, spec.tls_cert, spec.tls_key)
        except LaunchError as error:
            logger.warning("certificate.kept why=%s", error)
        else:
            logger.info("certificate.renewed file=%s", spec.tls_cert)

    async def stop(self) -> None:
        """Stop accepting, let requests finish within the drain time, leave the registry, close everything.

        Those that have not finished by then are told so.
        """
        self.core.drain()
        if self._registrar is not None and not self._ending.superseded:
            await self._registrar.set_state("draining", LEAVE_S)
        # Where others serve on, no client need notice: also not one that was about to send a request here.
        drain_s, idle_s = self._spec.drain_timeout_s, IDLE_S if self._spec.own_port else 0.0
        left = await asyncio.gather(*(one.drain(drain_s, idle_s) for one in self._servers))
        if any(left):
            logger.warning("frontend.drain_incomplete requests=%d", sum(left))
        for server in self._servers:
            await server.close()
        if self._registrar is not None:
            if self._ending.superseded:
                await self._registrar.close()
            else:
                await self._registrar.leave("stopped", LEAVE_S)
        await self._watcher.close()
        if self._talk is not None:
            self._talk.close()
        await self.core.close()
        self._links.close()
        self._registry.close()

    def _members_changed(self, upserts: list[Member], removed: list[str]) -> None:
        for worker in removed:
            logger.info("member.removed id=%s", worker)
        for member in upserts:
            logger.info(
                "member.changed id=%s incarnation=%d state=%s",
                member.instance.id,
                member.instance.incarnation,
                member.state,
            )
        self.core.members_changed(upserts, removed)
        self._links.members_changed(self._watcher.members)
        if self._talk is not None:
            self._talk.members_changed(self._watcher.members)

    def _serve_adapters(self) -> None:
        ways = Ways(self._list_adapters, self._links.sync_adapters, self.core.ready_workers)
        adapters = AdapterActions(ways, self.core.models)
        self.core.routes.actions["/v1/load_lora_adapter"] = adapters.load
        self.core.routes.actions["/v1/unload_lora_adapter"] = adapters.unload

    async def _list_adapters(self, op: str, body: msgspec.Struct) -> AdapterList:
        try:
            return await self._registry.call(op, body, AdapterList, LIST_S)
        except TransportError as error:
            raise Rejected("the controller does not answer", hint="try again later") from error

    def _instance(self, port: int, events: str) -> Instance:
        spec = self._spec
        scheme = "https" if spec.tls_cert else "http"
        dialled = spec.address if spec.address and spec.host in ("0.0.0.0", "::", "") else spec.host
        host = f"[{dialled}]" if ":" in dialled else dialled
        return Instance(
            id=spec.id,
            incarnation=self._incarnation,
            role="frontend",
            index=spec.index,
            node=spec.node,
            pid=os.getpid(),
            started_at=time.time(),
            url=f"{scheme}://{host}:{port}",
            backend=spec.backend,
            model=spec.model,
            events=events,
        )


async def run(spec: FrontendSpec, incarnation: int) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP renews the certificate.

    Raises LaunchError, or Superseded when another took the seat.
    """
    ending = Ending(asyncio.Event())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGURG):
        loop.add_signal_handler(number, ending.asked)
    frontend = Frontend(spec, incarnation, ending)
    loop.add_signal_handler(signal.SIGHUP, frontend.renew)
    try:
        port = await _unless_ended(frontend.start(), ending)
        if port is not None:
            # What was imported and built lives as long as the process: no collection needs to walk it.
            gc.freeze()
            mode, told = spec.router.mode, load.told()
            logger.info("frontend.listening host=%s port=%d mode=%s hot_path=%s", spec.host, port, mode, told)
            await ending.event.wait()
        logger.info("frontend.stopping superseded=%s", ending.superseded)
    finally:
        await frontend.stop()
    if ending.superseded:
        raise Superseded("a newer incarnation of this frontend is registered", where=spec.id)


async def _unless_ended(start: Coroutine[None, None, int], ending: Ending) -> int | None:
    """What `start` returns or raises; None when the end was asked for first."""
    starting = asyncio.create_task(start, name="start")
    asked = asyncio.create_task(ending.event.wait(), name="asked")
    await asyncio.wait((starting, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if starting.done():
        return starting.result()
    starting.cancel()
    await asyncio.wait((starting,))
    return None


def _limits(spec: FrontendSpec) -> Limits:
    limits = spec.limits
    return Limits(
        header_bytes=limits.header_bytes,
        body_bytes=limits.body_bytes,
        header_timeout_s=limits.header_timeout_s,
        body_timeout_s=limits.body_timeout_s,
        idle_timeout_s=limits.idle_timeout_s,
        max_connections=limits.max_connections,
    )


def _tls(spec: FrontendSpec) -> ssl.SSLContext | None:
    if not spec.tls_cert:
        return None
    context = certificate.server_context(spec.tls_cert, spec.tls_key)
    doubt = certificate.fault(spec.tls_cert, spec.tls_key)
    if doubt:
        logger.warning("certificate.invalid file=%s why=%s", spec.tls_cert, doubt)
    return context
