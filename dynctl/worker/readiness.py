"""Whether the engine really serves: its own process listens, it is healthy, and it has the model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from dynctl.engines import catalog
from dynctl.engines.base import Canary, Engine, EngineInfo, EngineLoad, PrefillDecode
from dynctl.errors import DynctlError, EngineFailed, NotReady, PortInUse, TransportError
from dynctl.http.client import Client, Origin, Response
from dynctl.protocol.specs import WorkerSpec
from dynctl.worker.port_holder import find_holder, is_former_self, listening_inodes

logger = logging.getLogger(__name__)

_PROBE_S = 5.0
_ADMIN_S = 50.0
_HEALTH_S = 25.0
"""An engine may answer its health probe by running a request."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 0.5
_WRONG_MODEL_PROBES = 5
_NO_SUCH_PROBE = (404, 405, 501)


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _Version(msgspec.Struct):
    version: str


class _Models(msgspec.Struct):
    data: list[_Model]


class WrongModel(NotReady):
    """The engine is up but serves another model: waiting does not help."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What a ready engine said of itself. `adapters`: LoRA names it serves beside the model.

    `peers`: see `PrefillDecode.peers`. `version` "" = not asked, or not told.
    """

    info: EngineInfo
    adapters: tuple[str, ...]
    peers: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """Where decode engines find this prefill engine, which they can once it answers `contract.peers_path`."""

    origin: Origin
    contract: PrefillDecode
    ranks: int = 1


class Probe:
    """Asks one engine over HTTP. `headers` go with every request: the key it asks for."""

    def __init__(
        self,
        client: Client,
        engine: Engine,
        url: str,
        model: str,
        bootstrap: Bootstrap | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.origin = Origin.parse(url)
        self._headers = tuple(headers)
        self._client = client
        self._engine = engine
        self._model = model
        self._bootstrap = bootstrap

    async def ready(self) -> Ready:
        """Ask everything once. Raises NotReady with what is missing, WrongModel, or TransportError."""
        await self.healthy()
        models = await self._get(self._engine.readiness.models, _PROBE_S)
        try:
            listed = msgspec.json.decode(models, type=_Models).data
        except msgspec.DecodeError as error:
            raise NotReady(f"{self._engine.readiness.models} is no model list: {error}") from error
        names = [model.id for model in listed]
        if self._model not in names and (self._engine.readiness.lists_served_name or not names):
            shown = ", ".join(names) or "nothing"
            raise WrongModel(
                f"the engine serves {shown}, not {self._model}",
                where=str(self.origin),
                hint="model.served_name",
            )
        adapters = tuple(model.id for model in listed if model.parent)
        info = self._engine.info(models, await self._metrics())
        return Ready(info, adapters, await self._peers(), await self._version())

    async def _peers(self) -> tuple[str, ...]:
        """Raises NotReady until decode engines can find this one."""
        if self._bootstrap is None:
            return ()
        origin, contract = self._bootstrap.origin, self._bootstrap.contract
        answer = await self._client.request(origin, "GET", contract.peers_path, timeout_s=_PROBE_S)
        if answer.status != 200:
            raise NotReady(f"its bootstrap server answers {answer.status}", where=str(origin))
        try:
            peers = contract.peers(answer.body)
        except EngineFailed as error:
            raise NotReady(str(error), where=str(origin)) from error
        if 0 < len(peers) < self._bootstrap.ranks:
            told = f"{len(peers)} of {self._bootstrap.ranks} ranks have registered at its bootstrap server"
            raise NotReady(told, where=str(origin))
        return peers

    async def _version(self) -> str:
        path = self._engine.readiness.version
        if not path:
            return ""
        response = await self._ask(path, _PROBE_S)
        try:
            return msgspec.json.decode(response.body, type=_Version).version if response.status == 200 else ""
        except msgspec.DecodeError:
            logger.warning("engine.version_unknown path=%s", path)
            return ""

    async def healthy(self) -> None:
        """Raises NotReady or TransportError unless the health probe answers 200 or there is none."""
        path = self._engine.readiness.health
        response = await self._ask(path, _HEALTH_S)
        if response.status != 200 and response.status not in _NO_SUCH_PROBE:
            raise NotReady(f"{path} answers {response.status}", where=str(self.origin))

    async def generates(self, canary: Canary, rank: int | None, timeout_s: float) -> str:
        """Have it generate one token, on `rank` of several; "", or why it has not.

        Whatever it answers below 500 shows that it works, a refusal too: it may know no such request.
        """
        headers = [*self._headers, (b"content-type", b"application/json")]
        if rank is not None:
            headers.append((b"x-data-parallel-rank", b"%d" % rank))
        try:
            response = await self._client.request(
                self.origin,
                "POST",
                canary.path,
                headers=headers,
                body=msgspec.json.encode(canary.body),
                timeout_s=timeout_s,
            )
        except TransportError as error:
            return str(error)
        return f"{canary.path} answers {response.status}" if response.status >= 500 else ""

    async def post(self, path: str, body: Mapping[str, str]) -> tuple[int, str]:
        """Have the engine do something to itself: status and text of its answer. Raises TransportError."""
        response = await self._client.request(
            self.origin,
            "POST",
            path,
            headers=[*self._headers, (b"content-type", b"application/json")],
            body=msgspec.json.encode(body),
            timeout_s=_ADMIN_S,
        )
        return response.status, response.body.decode("utf-8", "replace")

    async def load(self) -> list[EngineLoad]:
        """The engine's load by rank; [] when it tells none. Raises TransportError."""
        return self._engine.load(await self._metrics())

    async def _metrics(self) -> bytes:
        response = await self._ask(self._engine.load_path, _PROBE_S)
        return response.body if response.status == 200 else b""

    async def _ask(self, path: str, timeout_s: float) -> Response:
        return await self._client.request(
            self.origin, "GET", path, headers=self._headers, timeout_s=timeout_s
        )

    async def _get(self, path: str, timeout_s: float) -> bytes:
        response = await self._ask(path, timeout_s)
        if response.status != 200:
            raise NotReady(f"{path} answers {response.status}", where=str(self.origin))
        return response.body


def bootstrap_of(spec: WorkerSpec) -> Bootstrap | None:
    """The bootstrap server of the engine that `spec` is about; None when it has none to ask."""
    contract = catalog.contract(spec.backend, spec.kv_transfer) if spec.bootstrap_port else None
    if contract is None or not contract.peers_path:
        return None
    origin = Origin("http", Origin.parse(spec.url).host, spec.bootstrap_port)
    return Bootstrap(origin, contract, spec.dp_size)


async def wait_for_free_port(origin: Origin, deadline_s: float) -> None:
    """Before the engine starts. Raises PortInUse at once if a stranger listens on its port.

    A process of this very seat, started before us, is about to be gone: it is waited for.
    """
    try:
        async with asyncio.timeout(deadline_s):
            while holder := find_holder(origin.host, origin.port, 0):
                if not holder.pid or not is_former_self(holder.pid):
                    raise PortInUse(str(holder), hint="end that process or choose another port")
                await asyncio.sleep(_LONGEST_PAUSE_S)
    except TimeoutError:
        raise PortInUse(
            str(find_holder(origin.host, origin.port, 0)), hint="a former start of this seat has not ended"
        ) from None


async def wait_until_ready(probe: Probe, engine_pid: int, timeout_s: float) -> Ready:
    """Wait for an engine that was started as `engine_pid`. The caller watches that it lives.

    Raises PortInUse if another process listens on its port, WrongModel, or NotReady after `timeout_s` with
    what was missing last.
    """
    last: DynctlError = NotReady("it does not listen", where=str(probe.origin))
    verified: frozenset[str] = frozenset()
    wrong = 0
    pause = _FIRST_PAUSE_S
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                inodes = listening_inodes(probe.origin.host, probe.origin.port)
                if inodes and inodes != verified:
                    _check_holder(probe.origin, engine_pid)
                    verified = inodes
                if inodes:
                    try:
                        return await probe.ready()
                    except WrongModel as error:
                        wrong, last = wrong + 1, error
                        if wrong >= _WRONG_MODEL_PROBES:
                            raise
                    except (NotReady, TransportError) as error:
                        last = error
                await asyncio.sleep(pause)
                pause = min(pause * 1.3, _LONGEST_PAUSE_S)
    except TimeoutError:
        raise NotReady(
            f"the engine was not ready within {timeout_s:g} s: {last}", hint="engine.start_timeout"
        ) from None


def _check_holder(origin: Origin, engine_pid: int) -> None:
    holder = find_holder(origin.host, origin.port, engine_pid)
    if holder is None or holder.ours:
        return
    if holder.pid:
        raise PortInUse(str(holder), hint="another process answers in the engine's place")
    # Free when the engine was started, and now held by somebody whose files we may not read: most likely
    # its container. That it is healthy and serves our model is checked all the same.
    logger.warning("engine.port_holder_unknown port=%d", origin.port)
