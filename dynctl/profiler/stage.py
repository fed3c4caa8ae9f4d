"""What all parts of one measuring run share: engines to start, GPUs to start them on, time, the journal."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dynctl.deploy.home import trial_name
from dynctl.errors import DynctlError, LaunchError, ProfileError
from dynctl.http.client import Client
from dynctl.launchers.files import write_atomic
from dynctl.perfmodel.choice import Option
from dynctl.profiler.candidate import candidate
from dynctl.profiler.journal import Journal
from dynctl.profiler.load.client import split_url
from dynctl.profiler.load.spec import Endpoint
from dynctl.profiler.service import Asked
from dynctl.profiler.starts import Standing, Starts
from dynctl.recipe.lock import lock_text

logger = logging.getLogger(__name__)

_LOOK_S = 5.0
_BLOCKS = re.compile(rb"^\w*model_total_kv_blocks(?:\{.*\})? ([0-9.e+]+)$", re.MULTILINE)
_SIZE = re.compile(rb"^\w*model_kv_cache_block_size(?:\{.*\})? ([0-9.e+]+)$", re.MULTILINE)


class Spoilt(Exception):
    """A deployment did not do what it was started for: its logs are to be kept."""


class Shown(Protocol):
    """Somebody who watches. A row is a layout, or a split that is confirmed."""

    def begin(self, row: str, total: int) -> None:
        """A row with so many steps to go."""
        ...

    def step(self, row: str, doing: str, *, done: bool = False, lasts_s: float = 0.0) -> None:
        """What is being done; `done`: a step is behind it; `lasts_s`: what the row still takes, if known."""
        ...

    def end(self, row: str, told: str) -> None:
        """Nothing more of it."""
        ...


class Slots:
    """GPUs that candidates take and give back: so many in all, on SSH whole hosts; `parallel` at once."""

    def __init__(self, gpus: int, parallel: int, hosts: tuple[tuple[str, int], ...] = ()) -> None:
        self._gpus, self._parallel = sum(size for _, size in hosts) or gpus, parallel
        self._hosts = list(hosts)
        self._by_host = bool(hosts)
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def take(self, gpus: int) -> AsyncIterator[tuple[str, ...]]:
        """Hold so many; the names of their hosts, () = any. More than there are is all of them."""
        async with self._changed:
            gpus = min(gpus, self._gpus + self._held)
            await self._changed.wait_for(lambda: self._parallel > 0 and self._free(gpus))
            self._parallel -= 1
            hosts = self._pick(gpus)
            self._gpus -= gpus
            self._held += gpus
        try:
            yield tuple(name for name, _ in hosts)
        finally:
            async with self._changed:
                self._parallel += 1
                self._gpus += gpus
                self._held -= gpus
                self._hosts.extend(hosts)
                self._changed.notify_all()

    _held = 0

    def _free(self, gpus: int) -> bool:
        have = sum(size for _, size in self._hosts) if self._by_host else self._gpus
        return have >= gpus

    def _pick(self, gpus: int) -> list[tuple[str, int]]:
        picked: list[tuple[str, int]] = []
        while self._by_host and sum(size for _, size in picked) < gpus:
            picked.append(self._hosts.pop(0))
        return picked


@dataclass(slots=True)
class Stage:
    """One run. `ends_s`: when its time is over, by `time.monotonic`; `api_key`: of all it starts; `basis`:
    what costs depend on beside the layout (hardware, version of the engine). `spread`: how far estimates may
    be off. `probes`, `reused`, `gpu_s` count. `lingering`: deployments that may live on, and why; `kept`:
    those whose logs are kept.
    """

    asked: Asked
    run: str
    folder: Path
    starts: Starts
    journal: Journal
    slots: Slots
    shown: Shown
    ends_s: float
    api_key: str
    tokenizer: str
    hardware: str
    version: str
    spread: float = 1.0
    probes: int = 0
    reused: int = 0
    gpu_s: float = 0.0
    lingering: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.ends_s - time.monotonic()

    def endpoint(self, standing: Standing) -> Endpoint:
        """How to ask a deployment of this run."""
        model = self.asked.loaded.recipe.model.served_name
        return Endpoint(
            url=standing.url, model=model, api_key=self.api_key, tokenizer=self.tokenizer, verify=False
        )

    @asynccontextmanager
    async def standing(
        self, option: Option, word: str, hosts: tuple[str, ...] = ()
    ) -> AsyncIterator[Standing]:
        """A deployment of `option`, ready; ended at the end whatever happened. Raises as `dynctl up`."""
        name = trial_name(self.run, word)
        made = candidate(self.asked.loaded, option, name, self.api_key, hosts)
        path = self.folder / "candidates" / f"{name}.yaml"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, lock_text(made, self.version))
        except OSError as error:
            raise ProfileError(f"it cannot be written: {error.strerror}", where=str(path)) from error
        self.journal.add("started", name)
        begun_s, well = time.monotonic(), True
        try:
            limit_s = min(made.recipe.engine.start_timeout, max(1.0, self.left_s))
            yield await self.starts.up(path, name, limit_s)
        except (LaunchError, Spoilt):
            well = False
            raise
        finally:
            self.gpu_s += option.gpus * (time.monotonic() - begun_s)
            await self.end(name, well=well)
            path.unlink(missing_ok=True)

    async def end(self, name: str, *, well: bool = False) -> None:
        """End a deployment of this run or of an earlier one; those that live on are kept in `lingering`.

        Of those that did what they were started for nothing is kept; the logs of others are.
        """
        trouble = await self.starts.down(name, remove=well)
        if trouble:
            self.lingering.append(f"{name}: {trouble}")
            return
        if not well:
            self.kept.append(name)
        with contextlib.suppress(ProfileError):  # the disk is full: said already, or will be at once
            self.journal.add("ended", name)


async def kv_tokens(endpoint: Endpoint) -> int:
    """Tokens whose KV a rank of the engine behind a frontend holds, as it says itself; 0 = it does not."""
    origin, path = split_url(endpoint.url)
    client = Client()
    headers = [(b"authorization", f"Bearer {endpoint.api_key}".encode())]
    try:
        answer = await client.request(origin, "GET", f"{path}/metrics", headers=headers, timeout_s=_LOOK_S)
    except DynctlError as error:
        logger.info("metrics.unread error=%s", error)
        return 0
    finally:
        await client.close()
    blocks, size = _BLOCKS.search(answer.body), _SIZE.search(answer.body)
    return round(float(blocks[1]) * float(size[1])) if blocks and size else 0
