"""The life of a sidecar: start the engine, wait until it serves, keep its lease, drain, end with it."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from dynctl.engines import catalog
from dynctl.engines.base import Engine
from dynctl.errors import (
    DynctlError,
    LaunchError,
    NotReady,
    PortInUse,
    ProcessExited,
    Superseded,
    TransportError,
    UsageError,
)
from dynctl.http.client import Client
from dynctl.protocol.handover import Become
from dynctl.protocol.specs import EngineProcess, WorkerSpec
from dynctl.transport.keys import bearer, load_engine_key
from dynctl.worker.handover import ENDING, Next, become, kv_of, listen, next_of, told_later
from dynctl.worker.load import wait_until_idle
from dynctl.worker.planes import Attached, Planes
from dynctl.worker.port_holder import find_holder
from dynctl.worker.process import EngineChild, Handle
from dynctl.worker.readiness import (
    Probe,
    Ready,
    WrongModel,
    bootstrap_of,
    wait_for_free_port,
    wait_until_ready,
)

logger = logging.getLogger(__name__)

_ERROR_LINES = 20
_EXTERNAL_PERIOD_S = 1.0
_EXTERNAL_MISSES = 2
_QUIET_S = 0.3
_PREFILL_QUIET_S = 1.0
"""A prefill engine has no request left while decode engines still fetch its blocks."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sidecar ended against its will. `permanent`: it would end the same way again."""

    error: DynctlError
    exit_code: int | None = None
    lines: tuple[str, ...] = ()
    permanent: bool = False


class Worker:
    """One sidecar. `run` returns None when it was asked to end and has, else why it ended.

    `inherited`: the engine that runs already, of this process before it became this seat's.
    """

    def __init__(self, spec: WorkerSpec, incarnation: int, inherited: Handle | None = None) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._engine: Engine = catalog.get(spec.backend)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._superseded = asyncio.Event()
        self._inherited = inherited
        self._serving = False
        self._next: Next | None = None
        self._become = asyncio.Event()

    async def run(self) -> Ending | None:
        """Until the end. SIGTERM, SIGINT or SIGURG: drain and end; a second one: end without draining.

        SIGURG is for launchers whose signals reach the engine too, which ignores it.
        """
        loop = asyncio.get_running_loop()
        for number in ENDING:
            loop.add_signal_handler(number, self._on_signal)
        listen()
        if self._spec.follower:
            return await self._follow()
        client = Client()
        spec = self._spec
        planes: Planes | None = None
        try:
            headers = [bearer(load_engine_key(spec.engine_key_file))] if spec.engine_key_file else []
            probe = Probe(client, self._engine, spec.url, spec.model.name, bootstrap_of(spec), headers)
            planes = Planes(self._spec, self._incarnation, self._engine, probe, self._asked_to_become)
            planes.open()
            if self._spec.engine is None:
                return await self._attach(probe, planes)
            return await self._own(self._spec.engine, probe, planes)
        except DynctlError as error:
            return Ending(error)
        finally:
            if planes is not None:
                await planes.close()
            await client.close()

    def _on_signal(self) -> None:
        if self._stop.is_set():
            logger.info("worker.hurried")
            self._hurry.set()
        self._stop.set()

    def _asked_to_become(self, call: Become) -> None:
        """Raises UsageError."""
        if not self._serving or self._stop.is_set():
            raise UsageError("it has no engine that serves", where=self._spec.id)
        if self._next is not None:
            raise UsageError(f"it is about to become {self._next.spec.id}", where=self._spec.id)
        self._next = next_of(self._spec, call)
        self._become.set()

    async def _start(self, engine: EngineProcess) -> EngineChild | Ending:
        spec = self._spec
        try:
            if spec.engine_key_file:
                env = {**engine.env, spec.engine_key_variable: load_engine_key(spec.engine_key_file)}
                engine = msgspec.structs.replace(engine, env=env)
            return await EngineChild.start(engine, Path(spec.engine_log or f"logs/{spec.id}.engine.log"))
        except (LaunchError, TransportError) as error:
            return Ending(error, permanent=True)

    async def _follow(self) -> Ending | None:
        """A further node of a replica: nothing but the process."""
        if self._spec.engine is None:
            return Ending(LaunchError("a follower without an engine", where=self._spec.id), permanent=True)
        child = await self._start(self._spec.engine)
        if isinstance(child, Ending):
            return child
        try:
            await _first(child.wait(), self._stop.wait())
            return None if self._stop.is_set() else self._died(child, "ended")
        finally:
            await child.stop(self._spec.stop_timeout_s)

    async def _own(self, engine: EngineProcess, probe: Probe, planes: Planes) -> Ending | None:
        """An engine of our own."""
        if self._inherited is None:
            await wait_for_free_port(probe.origin, self._spec.stop_timeout_s)
            child = await self._start(engine)
        else:
            child = EngineChild.inherit(self._inherited)
            planes.recall_kv(kv_of(self._inherited))
        if isinstance(child, Ending):
            return child
        patience_s = self._spec.stop_timeout_s
        try:
            ready = await self._until_ready(child, probe)
            if not isinstance(ready, Ready):
                return ready
            await _first(planes.equip(ready), child.wait(), self._stop.wait())
            if child.exit_code is None:
                planes.attach(Attached(ready, child.pid), self._superseded.set)
            logger.info("worker.ready id=%s engine_pid=%d", self._spec.id, child.pid)
            self._serving = True
            await _first(child.wait(), self._stop.wait(), self._superseded.wait(), self._become.wait())
            if self._next is not None and not (self._superseded.is_set() or self._stop.is_set()):
                await self._hand_over(self._next, child, probe, planes)
            if self._superseded.is_set():
                patience_s = 0.0
                return self._was_superseded()
            if self._stop.is_set() and child.exit_code is None:
                await _first(self._drain(probe, planes), child.wait(), self._hurry.wait())
                await planes.detach("drained")
                return None
            await planes.detach("the engine has ended")
            return None if self._stop.is_set() else self._died(child, "ended")
        except DynctlError as error:
            patience_s = 0.0
            return Ending(error, lines=self._lines(child), permanent=isinstance(error, WrongModel))
        finally:
            await child.stop(patience_s)

    async def _hand_over(self, to: Next, child: EngineChild, probe: Probe, planes: Planes) -> None:
        """Become the sidecar of another seat: does not return but when it ended or is to end meanwhile.

        Raises LaunchError when it cannot.
        """
        await _first(self._drain(probe, planes), child.wait(), self._stop.wait(), self._superseded.wait())
        if self._stop.is_set() or self._superseded.is_set() or child.exit_code is not None:
            return
        kv = planes.kv_memory()
        with told_later():
            await planes.detach(f"it becomes {to.spec.id}")
            await planes.close()
            if not self._stop.is_set():
                become((self._spec.id, self._incarnation), to, child, kv)

    async def _until_ready(self, child: EngineChild, probe: Probe) -> Ready | Ending | None:
        """None: asked to end before it was ready. Raises NotReady, PortInUse."""
        waiting = asyncio.ensure_future(wait_until_ready(probe, child.pid, self._spec.start_timeout_s))
        try:
            await _first(_settled(waiting), child.wait(), self._stop.wait())
            if self._stop.is_set():
                return None
            if child.exit_code is not None:
                return self._died_at_start(child, probe)
            return await waiting
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    async def _drain(self, probe: Probe, planes: Planes) -> None:
        """No new requests, then none left, within the drain time."""
        heard = await planes.drain()
        logger.info("worker.draining id=%s heard=%s", self._spec.id, heard)
        quiet_s = _PREFILL_QUIET_S if self._spec.role == "prefill" else _QUIET_S
        idle = await wait_until_idle(probe, quiet_s=quiet_s, deadline_s=self._spec.drain_timeout_s)
        logger.info("worker.drained id=%s idle=%s", self._spec.id, idle)

    async def _attach(self, probe: Probe, planes: Planes) -> Ending | None:
        """An engine that runs elsewhere: registered while it serves, again and again."""
        while not self._stop.is_set():
            ready = await self._external_ready(probe)
            if ready is None:
                return None
            await _first(planes.equip(ready), self._stop.wait())
            planes.attach(Attached(ready, 0), self._superseded.set)
            logger.info("worker.attached id=%s url=%s", self._spec.id, self._spec.url)
            await _first(self._external_gone(probe), self._stop.wait(), self._superseded.wait())
            if self._superseded.is_set():
                return self._was_superseded()
            if self._stop.is_set():
                # Frontends give up what runs at a worker that has left: let it end first.
                await _first(self._drain(probe, planes), self._external_gone(probe), self._hurry.wait())
                await planes.detach("drained")
            else:
                await planes.detach("the engine does not answer")
        return None

    async def _external_ready(self, probe: Probe) -> Ready | None:
        """Wait for as long as it takes; None: asked to end. What is missing is logged when it changes."""
        said = ""
        while not self._stop.is_set():
            try:
                return await probe.ready()
            except (NotReady, TransportError) as error:
                if str(error) != said:
                    said = str(error)
                    logger.warning("engine.not_ready url=%s error=%s", self._spec.url, error)
            await _first(asyncio.sleep(_EXTERNAL_PERIOD_S), self._stop.wait())
        return None

    async def _external_gone(self, probe: Probe) -> None:
        """Returns when the engine has failed its health probe twice in a row."""
        misses = 0
        while misses < _EXTERNAL_MISSES:
            await asyncio.sleep(_EXTERNAL_PERIOD_S)
            try:
                await probe.healthy()
                misses = 0
            except (NotReady, TransportError) as error:
                misses += 1
                logger.warning("engine.unhealthy url=%s error=%s", self._spec.url, error)

    def _died(self, child: EngineChild, how: str) -> Ending:
        code = child.exit_code
        text = (
            f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        )
        error = ProcessExited(f"the engine {how} with {text}", where=self._spec.id)
        logger.error("engine.died pid=%d %s", child.pid, text)
        return Ending(error, code, self._lines(child))

    def _died_at_start(self, child: EngineChild, probe: Probe) -> Ending:
        """Most likely it has said why; that its port is taken is worth saying plainly."""
        died = self._died(child, "ended before it was ready")
        holder = find_holder(probe.origin.host, probe.origin.port, child.pid)
        if holder is None or holder.ours:
            return died
        return Ending(PortInUse(str(holder), where=self._spec.id), died.exit_code, died.lines)

    def _was_superseded(self) -> Ending:
        message = f"incarnation {self._incarnation} is superseded by a newer one"
        return Ending(Superseded(message, where=self._spec.id))

    def _lines(self, child: EngineChild) -> tuple[str, ...]:
        return tuple(self._engine.error_lines(child.log_lines(), _ERROR_LINES))


async def _settled(future: asyncio.Future[Any]) -> None:
    """Returns when it is done, whatever came of it."""
    await asyncio.wait([future])


async def _first(*coroutines: Coroutine[Any, Any, Any]) -> None:
    """Run all until one is done, then cancel the rest. What the done one raised is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
