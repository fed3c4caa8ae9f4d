"""LoRA adapters loaded and unloaded while the deployment runs: at every worker or, if it can be, at none.

The controller keeps the list of what ought to be loaded; each worker's sidecar brings its engine in line.
Here a client's wish is put on the list, the workers are told to look at once, and the client hears what came
of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dynctl.errors import DynctlError, EngineFailed, ModelNotFound, Rejected, RequestError, TransportError
from dynctl.frontend.admission import Models
from dynctl.frontend.body import excerpt
from dynctl.protocol.adapters import (
    Adapter,
    AdapterList,
    AdaptersHeld,
    AddAdapter,
    GetAdapters,
    RemoveAdapter,
)
from dynctl.protocol.instances import Instance

logger = logging.getLogger(__name__)

_LOOKS = 250
_LOOK_S = 0.02
T = TypeVar("T")


class _Load(msgspec.Struct):
    lora_name: str
    lora_path: str


class _Unload(msgspec.Struct):
    lora_name: str


@dataclass(frozen=True, slots=True)
class Ways:
    """Calls out. `listing`: op and body to the controller; raises Rejected when it is away.

    `sync`: to one worker's sidecar; raises DynctlError. `workers`: those that get requests now.
    """

    listing: Callable[[str, msgspec.Struct], Awaitable[AdapterList]]
    sync: Callable[[Instance], Awaitable[AdaptersHeld]]
    workers: Callable[[], list[Instance]]


class AdapterActions:
    """Answers the two endpoints. One change at a time."""

    def __init__(self, ways: Ways, models: Models) -> None:
        self._ways = ways
        self._models = models
        self._lock = asyncio.Lock()

    async def load(self, body: bytes) -> dict[str, Any]:
        """{"lora_name", "lora_path"}. Raises Rejected when the controller is away.

        RequestError or EngineFailed when a worker would or could not: then none has it.
        """
        asked = _read(body, _Load, "lora_name and lora_path, both strings")
        name = asked.lora_name
        if not name or not asked.lora_path:
            raise RequestError("`lora_name` and `lora_path` must not be empty", where="lora_name")
        async with self._lock:
            known = {adapter.name for adapter in (await self._ways.listing(*_LIST)).adapters}
            if name not in known and name in self._models.names():
                raise RequestError(f"the name {excerpt(name)} is taken", where="lora_name")
            await self._ways.listing(
                "adapters.add", AddAdapter(adapter=Adapter(name=name, path=asked.lora_path))
            )
            held, failed, refused = await self._tell_workers(name)
            if failed:
                if name not in known:
                    await self._take_back(name)
                raise _failure(f"the adapter {excerpt(name)} was not loaded", failed, refused)
            await self._seen(name, there=bool(held))
        return {"object": "lora_adapter", "id": name, "loaded": True, "workers": held}

    async def unload(self, body: bytes) -> dict[str, Any]:
        """{"lora_name"}. Raises ModelNotFound, EngineFailed that names the workers which still have it."""
        name = _read(body, _Unload, "lora_name, a string").lora_name
        async with self._lock:
            listed = await self._ways.listing(*_LIST)
            if name not in {adapter.name for adapter in listed.adapters}:
                raise ModelNotFound(
                    f"no adapter `{excerpt(name)}` was loaded here",
                    where="lora_name",
                    hint=f"loaded: {', '.join(one.name for one in listed.adapters) or 'none'}",
                )
            await self._ways.listing("adapters.remove", RemoveAdapter(name=name))
            _, failed, _ = await self._tell_workers(name)
            if failed:
                raise _failure(f"the adapter {excerpt(name)} is unloaded, but not everywhere", failed, False)
            await self._seen(name, there=False)
        return {"object": "lora_adapter", "id": name, "loaded": False}

    async def _tell_workers(self, name: str) -> tuple[list[str], dict[str, str], bool]:
        """Who has it now, why others could not do what they were to, and whether all of these refused."""
        workers = self._ways.workers()
        answers = await asyncio.gather(*(self._sync(worker) for worker in workers))
        held: list[str] = []
        failed: dict[str, str] = {}
        refused = True
        for worker, answer in zip(workers, answers, strict=True):
            if isinstance(answer, DynctlError):
                failed[worker.id] = (
                    "it does not answer" if isinstance(answer, TransportError) else str(answer)
                )
                refused = False
            elif name in answer.failed:
                failed[worker.id] = answer.failed[name]
                refused = refused and name in answer.refused
            elif name in answer.adapters:
                held.append(worker.id)
        return held, failed, refused

    async def _sync(self, worker: Instance) -> AdaptersHeld | DynctlError:
        try:
            return await self._ways.sync(worker)
        except DynctlError as error:
            logger.warning("adapters.unheard worker=%s error=%s", worker.id, error)
            return error

    async def _take_back(self, name: str) -> None:
        """A worker that cannot be told now takes it back when it looks at the list again."""
        try:
            await self._ways.listing("adapters.remove", RemoveAdapter(name=name))
        except Rejected as error:
            logger.error("adapter.left_listed name=%s error=%s", name, error)
            return
        await self._tell_workers(name)

    async def _seen(self, name: str, *, there: bool) -> None:
        """Wait until the membership has brought it here, so that the client's next request finds it so."""
        for _ in range(_LOOKS):
            if (name in self._models.names()) == there:
                return
            await asyncio.sleep(_LOOK_S)
        logger.warning("adapter.not_seen name=%s there=%s", name, there)


_LIST = ("adapters.list", GetAdapters())


def _read(body: bytes, kind: type[T], wanted: str) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the body must be a JSON object: {error}", hint=f"needed: {wanted}") from error


def _failure(message: str, failed: dict[str, str], refused: bool) -> DynctlError:
    told = "; ".join(f"{worker}: {why}" for worker, why in _few(failed.items()))
    kind = RequestError if refused else EngineFailed
    return kind(f"{message}: {told}")


def _few(items: Iterable[tuple[str, str]], most: int = 8) -> list[tuple[str, str]]:
    shown = list(items)
    return [*shown[:most], ("and others", f"{len(shown) - most}")] if len(shown) > most else shown
