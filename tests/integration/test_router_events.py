"""The router over real sockets: batches by publisher and subscriber, syncs by control calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
import pytest

from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, KvBatch, KvSync, KvSyncReply, Stored
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.follow import SyncTiming
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router, WorkerLinks
from dynctl.transport.control import ControlClient, ControlServer, read_body
from dynctl.transport.event_plane import Publisher, Subscriber
from dynctl.transport.keys import Keys
from tests.workers import worker_instance

ANY = "tcp://127.0.0.1:0"
TIMING = SyncTiming(deadline_s=5.0, retry_s=0.01, retry_limit_s=0.05, settle_s=30.0, recheck_s=30.0)


class Worker:
    """A sidecar's end: numbers and publishes batches, keeps them, answers syncs."""

    def __init__(self, keys: Keys, index: int, incarnation: int = 1) -> None:
        self.incarnation = incarnation
        self.id = f"aggregated-{index}"
        self.index = index
        self.batches: list[KvBatch] = []
        self.publisher = Publisher(keys, ANY)
        self.server = ControlServer(keys, ANY, self._answer)
        self.events = self.publisher.start()
        self.control = self.server.start()

    def member(self) -> Member:
        instance = worker_instance(
            self.index,
            id=self.id,
            incarnation=self.incarnation,
            model=ModelCard(name="m", block_size=16),
            events=self.events,
            control=self.control,
        )
        return Member(instance=instance, state="ready")

    def store(self, *hashes: int, lost: bool = False) -> None:
        """Hold blocks and publish so, unless the message gets lost."""
        batch = KvBatch(self.id, self.incarnation, 0, len(self.batches), [Stored(list(hashes))], 16)
        self.batches.append(batch)
        if not lost:
            self.publisher.publish(KV_TOPIC, batch)

    def repeat(self) -> None:
        self.publisher.publish(KV_TOPIC, self.batches[-1])

    async def _answer(self, op: str, body: msgspec.Raw) -> KvSyncReply:
        request = read_body(body, KvSync)
        return KvSyncReply(
            incarnation=self.incarnation,
            rank=request.rank,
            next_seq=len(self.batches),
            batches=self.batches[request.from_seq :],
            block_size=16,
        )

    async def close(self) -> None:
        self.publisher.close()
        await self.server.close()


class Plane:
    """Sockets of one frontend, and the workers around it."""

    def __init__(self) -> None:
        self.keys = Keys.generate()
        self.workers: list[Worker] = []
        self.clients: dict[str, ControlClient] = {}
        self.subscriber = Subscriber(self.keys, self._receive, (KV_TOPIC,))
        links = WorkerLinks(self._sync, self.subscriber.connect, self.subscriber.disconnect)
        self.router = Router(RouterSpec(mode="kv"), links, timing=TIMING)

    def worker(self, index: int, incarnation: int = 1) -> Worker:
        self.workers.append(Worker(self.keys, index, incarnation))
        return self.workers[-1]

    def _receive(self, topic: bytes, body: bytes) -> None:
        self.router.on_kv(msgspec.msgpack.decode(body, type=KvBatch))

    async def _sync(self, instance: Instance, request: KvSync) -> KvSyncReply:
        client = self.clients.get(instance.control)
        if client is None:
            client = self.clients[instance.control] = ControlClient(self.keys, instance.control)
        return await client.call("kv.sync", request, KvSyncReply, 5.0)

    def overlap(self, hashes: list[int]) -> tuple[str, int]:
        choice = self.router.choose(RouteRequest("aggregated", hashes, 16 * len(hashes)))
        choice.ticket.finish()
        return choice.instance.id, choice.overlap_blocks

    async def close(self) -> None:
        await self.router.close()
        self.subscriber.close()
        for client in self.clients.values():
            client.close()
        for worker in self.workers:
            await worker.close()


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    made = Plane()
    yield made
    await made.close()


async def until(condition: Callable[[], bool], meanwhile: Callable[[], None] | None = None) -> None:
    async with asyncio.timeout(10):
        while not condition():
            if meanwhile is not None:
                meanwhile()
            await asyncio.sleep(0.01)


async def test_requests_go_to_the_worker_that_says_it_holds_the_prompt(plane: Plane) -> None:
    workers = [plane.worker(0), plane.worker(1)]
    workers[1].store(1, 2, 3)
    plane.router.members_changed([worker.member() for worker in workers], [])
    await until(lambda: plane.overlap([1, 2, 3, 4]) == ("aggregated-1", 3))
    workers[0].store(1, 2, 3, 4)
    await until(lambda: plane.overlap([1, 2, 3, 4]) == ("aggregated-0", 4), workers[0].repeat)
    assert plane.router.doubts() == []


async def test_lost_messages_are_asked_for(plane: Plane) -> None:
    worker = plane.worker(0)
    plane.router.members_changed([worker.member()], [])
    worker.store(1)
    await until(lambda: plane.overlap([1]) == ("aggregated-0", 1), worker.repeat)
    for number in range(2, 50):
        worker.store(number, lost=True)
    worker.store(50)
    await until(lambda: plane.overlap(list(range(1, 51))) == ("aggregated-0", 50))
    (stream,) = plane.router.streams()
    assert stream.gaps >= 1
    assert stream.state == "synced"


async def test_restarted_worker_is_followed_at_its_new_endpoints(plane: Plane) -> None:
    old = plane.worker(0)
    old.store(1)
    plane.router.members_changed([old.member()], [])
    await until(lambda: plane.overlap([1]) == ("aggregated-0", 1))
    new = plane.worker(0, incarnation=2)
    plane.router.members_changed([new.member()], [])
    new.store(2)
    await until(lambda: plane.overlap([2]) == ("aggregated-0", 1), new.repeat)
    old.store(3)
    assert plane.overlap([1]) == plane.overlap([3]) == ("aggregated-0", 0)


async def test_worker_that_cannot_be_asked_yet_is_tried_until_it_answers(plane: Plane) -> None:
    worker = plane.worker(0)
    worker.store(7)
    await worker.server.close()
    plane.router.members_changed([worker.member()], [])
    await until(lambda: bool(plane.router.doubts()))
    worker.server = ControlServer(plane.keys, worker.control, worker._answer)
    worker.server.start()
    await until(lambda: plane.overlap([7]) == ("aggregated-0", 1))
    assert plane.router.doubts() == []
