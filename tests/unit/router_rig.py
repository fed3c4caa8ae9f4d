"""A router, and what it hangs on: workers that keep all their batches, and can be asked for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import (
    KvBatch,
    KvEvent,
    KvSync,
    KvSyncReply,
    Stored,
)
from dynctl.protocol.registry import InstanceState, Member
from dynctl.protocol.specs import RouterSpec
from dynctl.router.follow import SyncTiming
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router, WorkerLinks
from tests.workers import worker_instance

QUICK = SyncTiming(deadline_s=2.0, retry_s=0.001, retry_limit_s=0.002, settle_s=30.0, recheck_s=30.0)


def member(
    worker_id: str = "aggregated-0", incarnation: int = 1, state: InstanceState = "ready", **fields: Any
) -> Member:
    role: Any = worker_id.rsplit("-", 1)[0]
    given: dict[str, Any] = {
        "events": f"tcp://events-{worker_id}-{incarnation}",
        "control": f"tcp://control-{worker_id}",
        "model": ModelCard(name="m", block_size=16),
    }
    instance = worker_instance(
        int(worker_id.rsplit("-", 1)[1]),
        id=worker_id,
        incarnation=incarnation,
        role=role,
        **{**given, **fields},
    )
    return Member(instance=instance, state=state)


@dataclass
class Plane:
    """What the router hangs on: who is subscribed to, and workers that keep all their batches."""

    batches: dict[tuple[str, int], list[KvBatch]] = field(default_factory=dict)
    subscribed: list[str] = field(default_factory=list)
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    failures: list[Exception] = field(default_factory=list)
    snapshot: list[int] | None = None
    silent: bool = False

    def publish(self, *events: KvEvent, incarnation: int = 1, rank: int = 0, size: int = 16) -> KvBatch:
        sent = self.batches.setdefault(("aggregated-0", rank), [])
        sent.append(KvBatch("aggregated-0", incarnation, rank, len(sent), list(events), size))
        return sent[-1]

    async def sync(self, instance: Instance, request: KvSync) -> KvSyncReply:
        self.asked.append((instance.id, request.rank, request.from_seq))
        if self.failures:
            raise self.failures.pop(0)
        if self.silent:
            await asyncio.Event().wait()
        sent = self.batches.get((instance.id, request.rank), [])
        return KvSyncReply(
            incarnation=instance.incarnation,
            rank=request.rank,
            next_seq=len(sent),
            batches=sent[request.from_seq :] if self.snapshot is None else [],
            snapshot=None if self.snapshot is None else [Stored(self.snapshot)],
            block_size=sent[-1].block_size if sent else 0,
        )


@asynccontextmanager
async def routing(
    plane: Plane | None = None,
    *,
    timing: SyncTiming = QUICK,
    block_size: int = 0,
    clock: Callable[[], float] = lambda: 0.0,
    **spec: Any,
) -> AsyncIterator[Router]:
    plane = plane or Plane()
    links = WorkerLinks(plane.sync, plane.subscribed.append, plane.subscribed.remove)
    router = Router(
        RouterSpec(**spec), links, block_size=block_size, rng=Random(1), timing=timing, clock=clock
    )
    try:
        yield router
    finally:
        await router.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the condition has no event to wait for
            await asyncio.sleep(0.001)


async def synced(router: Router) -> None:
    await until(lambda: all(state.state == "synced" for state in router.streams()))


def overlap(router: Router, hashes: list[int], role: Role = "aggregated") -> int:
    choice = router.choose(RouteRequest(role, hashes, 16 * len(hashes)))
    choice.ticket.finish()
    return choice.overlap_blocks
