"""The frontend's ends to the workers' sidecars: the event plane in, control calls out.

What other frontends publish comes the same way in.
"""

from __future__ import annotations

import asyncio
import logging

import msgspec

from dynctl.protocol.adapters import AdaptersHeld, SyncAdapters
from dynctl.protocol.inflight import INFLIGHT_TOPIC, Inflight
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KV_TOPIC, LOAD_TOPIC, KvBatch, KvSync, KvSyncReply, LoadReport
from dynctl.protocol.registry import Member
from dynctl.router.service import Router, WorkerLinks
from dynctl.transport.control import ControlClient
from dynctl.transport.event_plane import Subscriber
from dynctl.transport.keys import Keys

logger = logging.getLogger(__name__)

SYNC_DEADLINE_S = 5.0
TAKEN_TOGETHER_S = 0.02
"""Events that follow one within this time are taken with it: all sidecars tell at the same moments."""
ADAPTERS_DEADLINE_S = 65.0


class Links:
    """One `subscriber` for all publishers, one control client per worker that was ever asked.

    `attach` says which router gets what comes; until then messages are dropped (they are numbered).
    """

    def __init__(self, keys: Keys, topics: tuple[bytes, ...]) -> None:
        self._keys = keys
        self._router: Router | None = None
        self._batches = msgspec.msgpack.Decoder(KvBatch)
        self._reports = msgspec.msgpack.Decoder(LoadReport)
        self._inflight = msgspec.msgpack.Decoder(Inflight)
        self._loop = asyncio.get_running_loop()
        self.subscriber = Subscriber(keys, self._receive, topics, gather_s=TAKEN_TOGETHER_S)
        self._clients: dict[str, ControlClient] = {}

    def worker_links(self) -> WorkerLinks:
        """What a router is made with."""
        return WorkerLinks(
            sync=self._sync, subscribe=self.subscriber.connect, unsubscribe=self.subscriber.disconnect
        )

    def attach(self, router: Router) -> None:
        """Hand events to `router` from now on."""
        self._router = router

    def members_changed(self, members: list[Member]) -> None:
        """Close the control clients of workers that are not among `members` any more."""
        there = {member.instance.control for member in members}
        for endpoint in [endpoint for endpoint in self._clients if endpoint not in there]:
            self._clients.pop(endpoint).close()

    def close(self) -> None:
        """Close all sockets."""
        self.subscriber.close()
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    async def sync_adapters(self, instance: Instance) -> AdaptersHeld:
        """Have a worker load and unload adapters now. Raises DynctlError."""
        client = self._client(instance)
        return await client.call("adapters.sync", SyncAdapters(), AdaptersHeld, ADAPTERS_DEADLINE_S)

    async def _sync(self, instance: Instance, request: KvSync) -> KvSyncReply:
        return await self._client(instance).call("kv.sync", request, KvSyncReply, SYNC_DEADLINE_S)

    def _client(self, instance: Instance) -> ControlClient:
        client = self._clients.get(instance.control)
        if client is None:
            client = self._clients[instance.control] = ControlClient(self._keys, instance.control)
        return client

    def _receive(self, topic: bytes, body: bytes) -> None:
        router = self._router
        if router is None:
            return
        try:
            if topic == KV_TOPIC:
                router.on_kv(self._batches.decode(body))
            elif topic == LOAD_TOPIC:
                router.on_load(self._reports.decode(body))
            elif topic == INFLIGHT_TOPIC:
                router.peers.take(self._inflight.decode(body), self._loop.time())
        except msgspec.DecodeError as error:
            logger.warning("event.unreadable topic=%s error=%s", topic.decode("latin-1"), error)
