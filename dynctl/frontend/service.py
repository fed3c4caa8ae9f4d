"""A frontend process: follows the membership, serves HTTP, drains when told to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from dynctl.discovery.client import Registrar, Watcher
from dynctl.errors import LaunchError, Superseded
from dynctl.frontend.core import Core
from dynctl.frontend.links import Links
from dynctl.http.server import Limits, Server, serve
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import FrontendSpec
from dynctl.transport.control import ControlClient
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

FIRST_VIEW_S = 1.0
LEAVE_S = 1.0


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
        self._links = Links(keys, topics)
        self.core = Core(spec, self._links.worker_links())
        self._links.attach(self.core.router)
        self._registry = ControlClient(keys, spec.registry)
        self._watcher = Watcher(keys, self._registry, spec.membership, on_change=self._members_changed)
        self._ending = ending
        self._registrar: Registrar | None = None
        self._server: Server | None = None

    async def start(self) -> int:
        """Listen, follow the membership, register. Returns the port. Raises PortInUse, LaunchError."""
        spec = self._spec
        self.core.warm()
        self._watcher.start()
        # Whoever finds the port open should find workers behind it, if the registry is there to tell of them.
        await self._watcher.synced(FIRST_VIEW_S)
        self._server = server = await serve(
            self.core.routes,
            host=spec.host,
            port=spec.port,
            limits=_limits(spec),
            tls=_tls(spec),
            reuse_port=False,
        )
        self.core.metrics.gauge("connections").read = lambda: float(server.connections)
        self._registrar = Registrar(
            self._registry, self._instance(server.port), on_superseded=self._ending.replaced
        )
        self._registrar.start()
        return server.port

    async def stop(self) -> None:
        """Stop accepting, let requests finish within the drain time, leave the registry, close everything."""
        if self._registrar is not None and not self._ending.superseded:
            await self._registrar.set_state("draining", LEAVE_S)
        if self._server is not None:
            left = await self._server.drain(self._spec.drain_timeout_s)
            if left:
                logger.warning("frontend.drain_incomplete requests=%d", left)
            await self._server.close()
        if self._registrar is not None:
            if self._ending.superseded:
                await self._registrar.close()
            else:
                await self._registrar.leave("stopped", LEAVE_S)
        await self._watcher.close()
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

    def _instance(self, port: int) -> Instance:
        spec = self._spec
        scheme = "https" if spec.tls_cert else "http"
        host = f"[{spec.host}]" if ":" in spec.host else spec.host
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
        )


async def run(spec: FrontendSpec, incarnation: int) -> None:
    """Serve until SIGTERM or SIGINT. Raises LaunchError, or Superseded when another took the seat."""
    ending = Ending(asyncio.Event())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.asked)
    frontend = Frontend(spec, incarnation, ending)
    try:
        port = await frontend.start()
        # What was imported and built lives as long as the process: no collection needs to walk it.
        gc.freeze()
        logger.info("frontend.listening host=%s port=%d mode=%s", spec.host, port, spec.router.mode)
        await ending.event.wait()
        logger.info("frontend.stopping superseded=%s", ending.superseded)
    finally:
        await frontend.stop()
    if ending.superseded:
        raise Superseded("a newer incarnation of this frontend is registered", where=spec.id)


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
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(Path(spec.tls_cert), Path(spec.tls_key) if spec.tls_key else None)
    except (OSError, ssl.SSLError) as error:
        raise LaunchError(
            f"the TLS certificate or key cannot be used: {error}",
            where=spec.tls_cert,
            hint="PEM files, the key not encrypted",
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
