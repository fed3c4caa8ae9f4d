"""KV events of an engine that publishes none: fetched over its HTTP, many times a second.

An answer empties the engine's queue, so there is one reader, this one, and an answer that does not arrive
whole has taken its events along: what is known of the engine's blocks is then forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from dynctl.engines.base import KvReader
from dynctl.errors import ConnectFailed, TransportError
from dynctl.http.client import Client, Origin
from dynctl.protocol.kv_events import EngineKvBatch
from dynctl.protocol.specs import KvPollSpec

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 2.0
_BODY_BYTES = 256 * 1024 * 1024
"""The first answer holds all since the engine's start."""


class Taker(Protocol):
    """Where events go: a `kv_relay.KvRelay`."""

    def take(self, batches: Sequence[EngineKvBatch]) -> None: ...

    def reset(self, reason: str) -> None: ...


class _Refused(TransportError):
    """The engine answered, but not with events: they are still there."""


class KvPoller:
    """Asks one engine, from its start to its end. `run` until cancelled."""

    def __init__(
        self, origin: Origin, poll: KvPollSpec, new_reader: Callable[[], KvReader], taker: Taker
    ) -> None:
        self._origin = origin
        self._poll = poll
        self._new_reader = new_reader
        self._taker = taker
        self._reader = new_reader()
        self._failures = 0
        self._forgotten = False

    async def run(self) -> None:
        """Ask, hand on, pause. Failures are logged once per streak and make the pauses longer."""
        client = Client(max_idle=1, body_bytes=_BODY_BYTES, resend=False)
        try:
            while True:
                try:
                    self._answered(await self._ask(client))
                except TransportError as error:
                    self._failed(error)
                await asyncio.sleep(pause_s(self._poll.interval_s, self._failures))
        finally:
            await client.close()

    async def _ask(self, client: Client) -> bytes:
        poll = self._poll
        response = await client.request(self._origin, poll.method, poll.path, timeout_s=poll.timeout_s)
        if response.status != 200:
            raise _Refused(f"{poll.path} answers {response.status}", where=str(self._origin))
        return response.body

    def _answered(self, body: bytes) -> None:
        batches = self._reader.read(body, time.time())
        if self._failures:
            logger.info("kv_poll.recovered failures=%d", self._failures)
        self._failures = 0
        if batches:
            self._forgotten = False
            self._taker.take(batches)

    def _failed(self, error: TransportError) -> None:
        self._failures += 1
        if self._failures == 1:
            logger.warning("kv_poll.failed error=%s", error)
        if isinstance(error, ConnectFailed | _Refused) or self._forgotten:
            return
        self._forgotten = True
        self._reader = self._new_reader()
        self._taker.reset(f"an answer with KV events was lost: {error}")


def pause_s(interval_s: float, failures: int) -> float:
    """Between two polls: twice as long with each failure in a row, up to 2 s."""
    return interval_s if not failures else min(interval_s * 2 ** min(failures, 10), _LONGEST_PAUSE_S)
