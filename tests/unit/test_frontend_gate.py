"""The gate: turns are given one by one, in order, as workers get free."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from dynctl.errors import Overloaded, PeerLost
from dynctl.frontend.gate import Gate
from dynctl.frontend.queue import Ask
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import Instance
from dynctl.protocol.kv_events import KvSync, KvSyncReply, LoadReport
from dynctl.protocol.registry import Member
from dynctl.protocol.specs import BusySpec, QueueSpec, RouterSpec
from dynctl.router.active import Ticket
from dynctl.router.busy import BATCH_TOKENS
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router, WorkerLinks
from tests.workers import worker_instance

PROMPT = 100


async def no_sync(instance: Instance, request: KvSync) -> KvSyncReply:
    raise PeerLost("no sidecar here")


class Rig:
    """A router over two workers, and a gate that lets one prompt be computed at each."""

    def __init__(self, queue: QueueSpec, busy: BusySpec) -> None:
        links = WorkerLinks(sync=no_sync, subscribe=lambda _: None, unsubscribe=lambda _: None)
        self.router = Router(RouterSpec(mode="least_loaded"), links, rng=Random(1))
        self.gate = Gate(self.router, ["aggregated"], queue, busy, Metrics(), "m")
        self.routed: list[str] = []
        self.tickets: list[Ticket] = []
        self.most = 0
        self.router.members_changed([self.member(0), self.member(1)], [])

    def member(self, index: int) -> Member:
        instance = worker_instance(index, id=f"w{index}")
        return Member(instance=instance, state="ready")

    async def request(self, name: str, ask: Ask) -> None:
        if self.gate.closed():
            await self.gate.wait(ask)
        self.tickets.append(self.router.choose(RouteRequest("aggregated", prompt_tokens=PROMPT)).ticket)
        self.routed.append(name)
        self.most = max(self.most, *(load.prefill_tokens for load in self.router.loads().values()))

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


ONE_EACH = BusySpec(prefill_tokens=PROMPT - 1)


async def test_turns_are_given_one_by_one_so_that_none_piles_up() -> None:
    rig = Rig(QueueSpec(), ONE_EACH)
    tasks = [asyncio.create_task(rig.request(str(number), Ask(PROMPT))) for number in range(10)]
    await rig.settle()
    assert rig.routed == ["0", "1"]
    while rig.tickets:
        for ticket in rig.tickets[:2]:
            ticket.first_token()
        del rig.tickets[:2]
        await rig.settle()
    await asyncio.gather(*tasks)
    assert rig.routed == [str(number) for number in range(10)]
    assert rig.most == PROMPT


async def test_whoever_comes_while_others_wait_goes_behind_them() -> None:
    rig = Rig(QueueSpec(), ONE_EACH)
    tasks = [asyncio.create_task(rig.request(name, Ask(PROMPT))) for name in ("a", "b", "waits")]
    await rig.settle()
    rig.tickets[0].first_token()
    tasks.append(asyncio.create_task(rig.request("pushes", Ask(PROMPT))))
    await rig.settle()
    assert rig.routed == ["a", "b", "waits"]
    for ticket in list(rig.tickets):
        ticket.finish()
    await asyncio.gather(*tasks)


async def test_shortest_policy_and_priority_reach_the_queue() -> None:
    rig = Rig(QueueSpec(policy="shortest"), ONE_EACH)
    assert rig.gate.by_length
    asks = {"a": Ask(), "b": Ask(), "long": Ask(5000), "short": Ask(5), "urgent": Ask(5000, priority=9999)}
    tasks = [asyncio.create_task(rig.request(name, ask)) for name, ask in asks.items()]
    await rig.settle()
    for _ in range(5):
        for ticket in list(rig.tickets):
            ticket.finish()
        await rig.settle()
    await asyncio.gather(*tasks)
    assert rig.routed == ["a", "b", "urgent", "short", "long"]


async def test_a_turn_whose_owner_left_at_the_same_moment_goes_to_the_next() -> None:
    rig = Rig(QueueSpec(), ONE_EACH)
    tasks = [asyncio.create_task(rig.request(name, Ask())) for name in ("a", "b", "leaves", "next")]
    await rig.settle()
    rig.tickets[0].first_token()
    await asyncio.sleep(0)
    tasks[2].cancel()
    await rig.settle()
    assert rig.routed == ["a", "b", "next"]
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_new_worker_wakes_those_who_wait() -> None:
    rig = Rig(QueueSpec(), ONE_EACH)
    tasks = [asyncio.create_task(rig.request(name, Ask())) for name in ("a", "b", "c")]
    await rig.settle()
    rig.router.members_changed([rig.member(2)], [])
    await asyncio.gather(*tasks)


async def test_higher_thresholds_wake_those_who_wait() -> None:
    rig = Rig(QueueSpec(), ONE_EACH)
    tasks = [asyncio.create_task(rig.request(name, Ask())) for name in ("a", "b", "c")]
    await rig.settle()
    rig.gate.thresholds = BusySpec(prefill_tokens=10**6)
    await asyncio.gather(*tasks)


async def test_a_backlog_in_every_engine_holds_requests_back_by_default() -> None:
    rig = Rig(QueueSpec(threshold=1.0), BusySpec())
    for index in range(2):
        report = LoadReport(f"w{index}", 1, 0, running=0, waiting=2, kv_usage=0.0, kv_blocks=100)
        rig.router.on_load(report)
        rig.router.choose(RouteRequest("aggregated", prompt_tokens=BATCH_TOKENS + 1))
    assert rig.gate.closed()
    off = Gate(rig.router, ["aggregated"], QueueSpec(limit=0), BusySpec(), Metrics(), "m")
    assert not off.closed(), "a backlog refuses nobody where nobody can wait"


async def test_the_wait_has_an_end() -> None:
    rig = Rig(QueueSpec(deadline_s=0.01), BusySpec(prefill_tokens=-1))
    with pytest.raises(Overloaded, match=r"busy for 0\.01 s"):
        await rig.request("x", Ask())
    assert not rig.gate._turns
