"""The LoRA adapters of one engine, brought in line with the deployment's list."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping

from dynctl.engines.base import LoraPaths
from dynctl.errors import DynctlError, TransportError
from dynctl.protocol.adapters import AdapterList, AdaptersHeld, GetAdapters
from dynctl.transport.control import ControlClient

logger = logging.getLogger(__name__)

PERIOD_S = 5.0
_ASK_S = 2.0

Post = Callable[[str, Mapping[str, str]], Awaitable[tuple[int, str]]]
"""Asks the engine: HTTP path and JSON body to status and text. Raises TransportError."""
Told = Callable[[list[str]], Awaitable[None]]
"""Hears what the engine serves beside the model, whenever that changes and before an adapter is unloaded."""


class Adapters:
    """`attach` an engine with what it serves already; `sync` asks the controller and loads and unloads.

    Adapters that were not loaded from here stay as they are. `paths` None: the engine can load none.
    """

    def __init__(self, controller: ControlClient, paths: LoraPaths | None, post: Post, told: Told) -> None:
        self._controller = controller
        self._paths = paths
        self._post = post
        self._told = told
        self._held: list[str] = []
        self._ours: set[str] = set()
        self._failed: dict[str, str] = {}
        self._refused: set[str] = set()
        self._lock = asyncio.Lock()

    @property
    def held(self) -> list[str]:
        """What the engine serves beside the model."""
        return list(self._held)

    def attach(self, held: Iterable[str]) -> None:
        """A new engine, which serves `held`."""
        self._held = list(dict.fromkeys(held))
        self._ours = set()
        self._failed = {}

    async def keep(self) -> None:
        """Sync now and then, for as long as it runs: the controller may have been away."""
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.sync()
            except DynctlError as error:
                logger.debug("adapters.unheard error=%s", error)

    async def sync(self) -> AdaptersHeld:
        """Bring the engine in line. Raises TransportError when the controller is away."""
        async with self._lock:
            wanted = await self._controller.call("adapters.list", GetAdapters(), AdapterList, _ASK_S)
            paths = {adapter.name: adapter.path for adapter in wanted.adapters}
            self._failed = {name: why for name, why in self._failed.items() if name in paths}
            for name in [name for name in self._ours if name not in paths]:
                await self._unload(name)
            for name, path in paths.items():
                if name not in self._held:
                    await self._load(name, path)
            return AdaptersHeld(
                adapters=self.held, failed=self._failed, refused=sorted(self._refused & set(self._failed))
            )

    async def _load(self, name: str, path: str) -> None:
        if await self._ask("load", name, {"lora_name": name, "lora_path": path}):
            self._ours.add(name)
            self._held.append(name)
            await self._told(self.held)

    async def _unload(self, name: str) -> None:
        """No request is sent to it before the engine forgets it."""
        if name in self._held:
            self._held.remove(name)
            await self._told(self.held)
        if await self._ask("unload", name, {"lora_name": name}):
            self._ours.discard(name)

    async def _ask(self, what: str, name: str, body: Mapping[str, str]) -> bool:
        """Whether the engine has done it; why not is noted, and logged when it is news."""
        if self._paths is None:
            status, why = 400, "this engine cannot load adapters while it runs"
        else:
            try:
                status, why = await self._post(getattr(self._paths, what), body)
            except TransportError as error:
                logger.warning("adapter.engine_silent name=%s error=%s", name, error)
                status, why = 0, f"{what}: the engine does not answer"
        if status == 200:
            logger.info("adapter.%sed name=%s", what, name)
            self._failed.pop(name, None)
            return True
        told = f"{what} answered {status}: {why[:300]}" if status else why
        if self._failed.get(name) != told:
            logger.warning("adapter.not_%sed name=%s why=%s", what, name, told)
        self._failed[name] = told
        (self._refused.add if 400 <= status < 500 else self._refused.discard)(name)
        return False
