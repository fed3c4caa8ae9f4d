from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest

from dynctl.errors import DynctlError, PeerLost, Rejected, RequestError
from dynctl.kv.hashing import OF_BYTES
from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import (
    KV_TOPIC,
    LOAD_TOPIC,
    Cleared,
    KvBatch,
    KvEvent,
    KvSync,
    KvSyncReply,
    LoadReport,
    Stored,
)
from dynctl.protocol.registry import InstanceState, Member
from dynctl.protocol.specs import AffinitySpec, ConditionalDisaggSpec, RouterSpec
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


async def test_choice_counts_until_its_ticket_ends() -> None:
    async with routing(mode="least_loaded") as router:
        router.members_changed([member("aggregated-0"), member("aggregated-1")], [])
        first = router.choose(RouteRequest("aggregated", None, 100))
        second = router.choose(RouteRequest("aggregated", None, 100))
        assert {first.instance.id, second.instance.id} == {"aggregated-0", "aggregated-1"}
        assert first.candidates == 2
        first.ticket.finish()
        third = router.choose(RouteRequest("aggregated", None, 100))
        assert third.instance.id == first.instance.id
        loads = router.loads()
        assert [loads[key].requests for key in sorted(loads)] == [1, 1]


async def test_every_rank_of_a_worker_is_a_candidate() -> None:
    async with routing(mode="round_robin") as router:
        router.members_changed([member(dp_size=2), member("aggregated-1")], [])
        request = RouteRequest("aggregated")
        choices = [router.choose(request) for _ in range(3)]
        picked = [(choice.instance.id, choice.rank) for choice in choices]
        assert picked == [("aggregated-0", 0), ("aggregated-0", 1), ("aggregated-1", 0)]


async def test_nobody_to_choose_is_said_in_words() -> None:
    async with routing(mode="round_robin") as router:
        request = RouteRequest("decode")
        with pytest.raises(Rejected, match="no worker of role decode is registered"):
            router.choose(request)
        router.members_changed([member("decode-0", state="draining")], [])
        with pytest.raises(Rejected, match="all 1 are draining"):
            router.choose(request)
        router.members_changed([member("decode-0")], [])
        with pytest.raises(Rejected, match="all 1 failed this request"):
            router.choose(RouteRequest("decode", exclude=frozenset({"decode-0"})))


async def test_not_ready_is_said_in_words() -> None:
    async with routing(mode="round_robin") as router:
        needed = {"prefill": 2, "decode": 1, "aggregated": 0}
        router.members_changed([member("prefill-0"), member("frontend-0")], [])
        assert router.ready(needed) == ["decode: 0 of 1 ready"]
        router.members_changed([member("decode-0", state="draining")], [])
        assert router.ready(needed) == ["decode: 0 of 1 ready (1 draining)"]
        router.members_changed([member("decode-0")], [])
        assert router.ready(needed) == []
        router.members_changed([], ["prefill-0", "never-seen"])
        assert router.ready(needed) == ["prefill: 0 of 2 ready"]


async def test_older_incarnation_does_not_replace_a_newer() -> None:
    async with routing(mode="round_robin") as router:
        router.members_changed([member(incarnation=2)], [])
        router.members_changed([member(incarnation=1)], [])
        assert router.choose(RouteRequest("aggregated")).instance.incarnation == 2


async def test_restarted_worker_starts_without_the_load_of_the_one_before() -> None:
    plane = Plane()
    async with routing(plane, mode="least_loaded") as router:
        router.members_changed([member()], [])
        ticket = router.choose(RouteRequest("aggregated", None, 100)).ticket
        router.members_changed([member(incarnation=2)], [])
        assert plane.subscribed == ["tcp://events-aggregated-0-2"]
        ticket.finish()
        assert [load.requests for load in router.loads().values()] == [0]


async def test_reports_count_for_the_known_incarnation_and_rank_only() -> None:
    async with routing(mode="least_loaded") as router:
        router.members_changed([member()], [])
        for report in (
            LoadReport("aggregated-0", 2, 0, 5, 0, 0.0),
            LoadReport("aggregated-0", 1, 1, 5, 0, 0.0),
            LoadReport("unknown-0", 1, 0, 5, 0, 0.0),
        ):
            router.on_load(report)
        assert [load.requests for load in router.loads().values()] == [0]
        router.on_load(LoadReport("aggregated-0", 1, 0, 5, 2, 0.0))
        assert [load.requests for load in router.loads().values()] == [7]


async def test_only_kv_mode_wants_kv_events() -> None:
    async with routing(mode="kv") as router:
        assert router.topics == (KV_TOPIC, LOAD_TOPIC)
    plane = Plane()
    async with routing(plane, mode="least_loaded") as router:
        assert router.topics == (LOAD_TOPIC,)
        router.members_changed([member()], [])
        assert plane.subscribed == ["tcp://events-aggregated-0-1"]
        assert router.streams() == []
        assert router.doubts() == []


async def test_worker_that_joins_late_is_known_by_what_it_already_held() -> None:
    plane = Plane()
    plane.publish(Stored([1, 2]))
    async with routing(plane) as router:
        router.members_changed([member()], [])
        assert router.doubts() == ["aggregated-0 rank 0: its KV index is being synced (0 batches wait)"]
        await synced(router)
        assert overlap(router, [1, 2, 3]) == 2
        assert router.held() == {("aggregated-0", 0): 2}
        assert router.doubts() == []


async def test_decode_workers_are_not_indexed() -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member("decode-0"), member("prefill-0")], [])
        assert [state.worker for state in router.streams()] == ["prefill-0"]


async def test_gap_is_filled_by_asking_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        plane.publish(Stored([1]))
        router.on_kv(plane.publish(Stored([2])))
        assert "index.gap worker=aggregated-0 rank=0 expected=0 got=1" in caplog.text
        await synced(router)
        assert overlap(router, [1, 2]) == 2
        assert plane.asked == [("aggregated-0", 0, 0)] * 2


async def test_too_old_a_gap_reloads_the_whole_index() -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        router.on_kv(plane.publish(Stored([1])))
        plane.snapshot = list(range(100, 9000))
        plane.publish()
        router.on_kv(plane.publish())
        await synced(router)
        assert overlap(router, [1]) == 0
        assert overlap(router, plane.snapshot[:50]) == 50
        assert router.streams()[0].reloads == 1


async def test_failed_sync_is_tried_again_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plane = Plane(failures=[PeerLost("gone"), DynctlError("not yet"), PeerLost("gone")])
    plane.publish(Stored([1]))
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        await until(lambda: "index.synced worker=aggregated-0 rank=0 failures=3" in caplog.text)
        assert caplog.text.count("index.sync_failed") == 1
        assert len(plane.asked) == 4


async def test_sync_without_answer_ends_at_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    plane = Plane(silent=True)
    async with routing(plane, timing=SyncTiming(deadline_s=0.01, retry_s=0.001)) as router:
        router.members_changed([member()], [])
        await until(lambda: "no answer in 0.01 s" in caplog.text)
        plane.silent = False
        await synced(router)


async def test_answer_that_leaves_a_gap_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    plane = Plane()

    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        router.on_kv(KvBatch("aggregated-0", 1, 0, 3, [Stored([3])]))
        await until(lambda: "the answer goes up to batch 0, wanted from 0 on" in caplog.text)
        for number in range(4):
            plane.publish(Stored([number]))
        await synced(router)
        assert overlap(router, [0, 1, 2, 3]) == 4


async def test_lost_last_batch_is_found_without_a_next_one() -> None:
    plane = Plane()
    timing = SyncTiming(deadline_s=2.0, retry_s=0.001, settle_s=0.005, recheck_s=0.005)
    async with routing(plane, timing=timing) as router:
        router.members_changed([member()], [])
        await synced(router)
        plane.publish(Stored([1]))
        await until(lambda: router.held().get(("aggregated-0", 0)) == 1)


async def test_newer_incarnation_seen_by_its_events_ends_the_older_and_is_followed_as_a_member() -> None:
    plane = Plane()
    timing = SyncTiming(deadline_s=2.0, retry_s=0.001, settle_s=0.005, recheck_s=0.005)
    async with routing(plane, timing=timing) as router:
        router.members_changed([member()], [])
        await synced(router)
        router.on_kv(plane.publish(Stored([1])))
        plane.batches.clear()
        router.on_kv(plane.publish(Stored([2]), incarnation=2))
        assert overlap(router, [1]) == 0
        follower = router._following._followers["aggregated-0", 0].task
        await until(follower.done)
        router.members_changed([member(incarnation=2)], [])
        await synced(router)
        assert overlap(router, [2]) == 1


async def test_removed_worker_is_forgotten_and_its_bits_are_cleared() -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        router.on_kv(plane.publish(Stored(list(range(500)))))
        router.members_changed([], ["aggregated-0"])
        assert (router.streams(), router.held(), plane.subscribed) == ([], {}, [])
        await until(lambda: not router._index.dirty)


async def test_cleared_worker_is_tidied_too() -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await synced(router)
        router.on_kv(plane.publish(Stored([1, 2]), Cleared(), Stored([3])))
        await until(lambda: not router._index.dirty)
        assert (overlap(router, [1]), overlap(router, [3])) == (0, 1)


async def test_rank_unknown_to_the_membership_is_synced() -> None:
    plane = Plane()
    async with routing(plane) as router:
        router.members_changed([member()], [])
        plane.publish(Stored([1]), rank=1)
        router.on_kv(plane.publish(Stored([2]), rank=1))
        await synced(router)
        assert router.held()["aggregated-0", 1] == 2


async def test_block_size_is_the_workers_own_before_the_recipes() -> None:
    plane = Plane()
    async with routing(plane, block_size=128) as router:
        assert router.block_size == 128
        router.members_changed([member(model=None)], [])
        assert router.block_size == 128
        await synced(router)
        router.on_kv(plane.publish(Stored([1]), size=32))
        assert router.block_size == 32
        router.members_changed([], ["aggregated-0"])
        assert router.block_size == 128


async def test_block_size_is_learnt_from_an_answer_too() -> None:
    plane = Plane()
    plane.publish(Stored([1]), size=64)
    async with routing(plane) as router:
        router.members_changed([member(model=None)], [])
        await until(lambda: router.block_size == 64)


async def test_differing_block_sizes_and_missing_events_are_doubts() -> None:
    async with routing() as router:
        other = ModelCard(name="m", block_size=64)
        router.members_changed(
            [member(), member("aggregated-1", model=other), member("aggregated-2", events="", control="")], []
        )
        await synced(router)
        told = router.doubts()
        router.members_changed([], ["aggregated-2"])
        assert len(router.doubts()) == 1
        assert told == [
            "aggregated-1: its block size is 64 tokens, not 16, so none of its cached blocks are seen",
            "aggregated-2: it publishes no KV events: what it has cached is guessed",
        ]
        assert router.guessed() == []


async def test_worker_without_events_is_a_doubt_of_its_own_kind_where_only_events_count() -> None:
    async with routing(events="exact") as router:
        router.members_changed([member(kv_events=False)], [])
        assert router.doubts() == [
            "aggregated-0: it publishes no KV events, so none of its cached blocks are seen"
        ]
        assert router.guessed() == []


async def computed(router: Router, hashes: list[int], **fields: Any) -> str:
    """A request to its end; the worker it went to."""
    choice = router.choose(RouteRequest("aggregated", hashes, 16 * len(hashes), **fields))
    choice.ticket.first_token()
    choice.ticket.finish()
    return choice.instance.id


@pytest.mark.parametrize("spec", [{}, {"events": "approximate"}])
async def test_worker_without_events_is_known_by_what_it_was_sent(spec: dict[str, Any]) -> None:
    now = [0.0]
    async with routing(clock=lambda: now[0], **spec) as router:
        told = not spec
        router.members_changed([member(kv_events=not told), member("aggregated-1", kv_events=False)], [])
        assert router.guessed() == ["aggregated-0", "aggregated-1"]
        assert router.topics == ((KV_TOPIC, LOAD_TOPIC) if told else (LOAD_TOPIC,))
        assert router.streams() == []
        where = await computed(router, [1, 2, 3])
        assert overlap(router, [1, 2, 3, 4]) == 3
        assert {await computed(router, [1, 2, 3, 4]) for _ in range(10)} == {where}
        now[0] = 121.0
        assert overlap(router, [1, 2, 3, 4]) == 0
        router.members_changed([], ["aggregated-0", "aggregated-1"])
        assert router._recent.held == 0


async def test_prompts_known_by_their_bytes_go_where_they_went_although_events_would_not_tell() -> None:
    now = [0.0]
    of_bytes = [OF_BYTES | number for number in range(4)]
    async with routing(clock=lambda: now[0]) as router:
        router.members_changed([member(), member("aggregated-1")], [])
        where = await computed(router, of_bytes[:3])
        now[0] = 60.0
        assert overlap(router, of_bytes) == 3
        assert {await computed(router, of_bytes) for _ in range(5)} == {where}
        now[0] = 200.0
        assert overlap(router, of_bytes) == 0
        router.members_changed([], ["aggregated-0", "aggregated-1"])
        assert router._recent.held == 0


async def test_guessed_cache_is_bounded_by_the_blocks_a_worker_has() -> None:
    async with routing(approximate_cache="lru") as router:
        router.members_changed([member(kv_events=False)], [])
        router.on_load(LoadReport("aggregated-0", 1, 0, 0, 0, 0.0, kv_blocks=4))
        await computed(router, [1, 2, 3])
        await computed(router, [11, 12, 13])
        assert (overlap(router, [1, 2, 3]), overlap(router, [11, 12, 13])) == (0, 3)


async def test_prompt_counts_as_cached_between_its_end_and_its_event() -> None:
    now = [0.0]
    async with routing(clock=lambda: now[0]) as router:
        router.members_changed([member()], [])
        await synced(router)
        await computed(router, [1, 2, 3])
        assert overlap(router, [1, 2, 3]) == 3
        now[0] = 2.0
        assert overlap(router, [1, 2, 3]) == 0


async def test_failed_request_leaves_nothing_to_be_found() -> None:
    async with routing() as router:
        router.members_changed([member(kv_events=False)], [])
        router.choose(RouteRequest("aggregated", [1, 2], 32)).ticket.finish()
        assert overlap(router, [1, 2]) == 0


async def test_prompt_of_a_worker_that_died_is_not_believed_to_be_at_the_one_in_its_place() -> None:
    async with routing() as router:
        router.members_changed([member(events="", control="")], [])
        ticket = router.choose(RouteRequest("aggregated", [1, 2, 3], 48)).ticket
        ticket.first_token()
        router.members_changed([member(incarnation=2, events="", control="")], [])
        ticket.finish()
        assert overlap(router, [1, 2, 3]) == 0


async def test_burst_of_siblings_goes_to_one_worker_before_any_event() -> None:
    async with routing() as router:
        router.members_changed([member(f"aggregated-{number}") for number in range(4)], [])
        burst = [router.choose(RouteRequest("aggregated", list(range(512)), 8192)) for _ in range(6)]
        assert len({choice.instance.id for choice in burst}) == 1
        assert [choice.overlap_blocks for choice in burst] == [0, 512, 512, 512, 512, 512]
        assert burst[-1].best_overlap_blocks == 512


async def test_hot_prefix_does_not_starve_the_other_workers() -> None:
    async with routing() as router:
        router.members_changed([member(f"aggregated-{number}") for number in range(4)], [])
        for number in range(200):
            router.choose(RouteRequest("aggregated", [*range(512), 10_000 + number], 8208))
        requests = sorted(load.requests for load in router.loads().values())
        assert requests[0] > 0
        assert requests[-1] <= 1.5 * 50 + 8 + 1


async def test_session_stays_with_its_worker() -> None:
    affinity = AffinitySpec(mode="soft", ttl_s=10.0)
    now = [0.0]
    async with routing(mode="round_robin", session_affinity=affinity, clock=lambda: now[0]) as router:
        router.members_changed([member(f"aggregated-{number}") for number in range(3)], [])
        request = RouteRequest("aggregated", session="s")
        first = router.choose(request).instance.id
        assert {router.choose(request).instance.id for _ in range(3)} == {first}
        router.end_session("s")
        assert router.choose(request).instance.id != first


async def test_worker_asked_for_is_chosen_or_the_reason_is_told() -> None:
    async with routing(mode="least_loaded") as router:
        router.members_changed([member(dp_size=2), member("aggregated-1", state="draining")], [])
        asked = RouteRequest("aggregated", pinned="aggregated-0", pinned_rank=1)
        choices = [router.choose(asked) for _ in range(3)]
        assert {(choice.instance.id, choice.rank) for choice in choices} == {("aggregated-0", 1)}
        assert router.choose(RouteRequest("aggregated", pinned_rank=1)).rank == 1
        with pytest.raises(Rejected, match="the worker asked for, aggregated-1, is draining"):
            router.choose(RouteRequest("aggregated", pinned="aggregated-1"))
        with pytest.raises(Rejected, match="the worker asked for, aggregated-0, failed this request"):
            router.choose(
                RouteRequest("aggregated", pinned="aggregated-0", exclude=frozenset({"aggregated-0"}))
            )
        with pytest.raises(RequestError, match=r"no worker .decode-0. of role aggregated.*-0") as no:
            router.choose(RouteRequest("aggregated", pinned="decode-0"))
        assert not isinstance(no.value, Rejected)
        with pytest.raises(RequestError, match=r"no rank 2 at worker .aggregated-0..*0 to 1"):
            router.choose(RouteRequest("aggregated", pinned="aggregated-0", pinned_rank=2))
        for rank in (5, -1):
            with pytest.raises(RequestError, match=f"no rank {rank} at any worker"):
                router.choose(RouteRequest("aggregated", pinned_rank=rank))
        router.members_changed([member(dp_size=2, state="silent")], [])
        with pytest.raises(Rejected, match="no worker has rank 1 ready"):
            router.choose(RouteRequest("aggregated", pinned_rank=1))


async def test_preview_tells_all_candidates_and_counts_nothing() -> None:
    async with routing(mode="kv") as router:
        router.members_changed([member(), member("aggregated-1")], [])
        router._index.apply(("aggregated-1", 0), Stored([1, 2]))
        rows = router.preview(RouteRequest("aggregated", [1, 2, 3], 48))
        assert [(row.worker, row.rank, row.chosen, row.overlap_blocks) for row in rows] == [
            ("aggregated-0", 0, False, 0),
            ("aggregated-1", 0, True, 2),
        ]
        assert rows[0].cost > rows[1].cost
        assert {load.requests for load in router.loads().values()} == {0}


async def test_round_robin_keeps_its_turn_through_a_preview() -> None:
    async with routing(mode="round_robin") as router:
        router.members_changed([member(), member("aggregated-1")], [])
        for _ in range(3):
            assert [row.chosen for row in router.preview(RouteRequest("aggregated"))] == [True, False]
        assert router.choose(RouteRequest("aggregated")).instance.id == "aggregated-0"


async def test_decode_reads_a_prompt_it_has_most_of() -> None:
    async with routing(conditional_disagg=ConditionalDisaggSpec(mode="isl")) as router:
        router.members_changed([member("prefill-0"), member("decode-0"), member("decode-1")], [])
        router._index.apply(("decode-1", 0), Stored(list(range(90))))
        hashes = list(range(100))
        assert router.skips_prefill(RouteRequest("decode", hashes, 1600))
        assert not router.skips_prefill(RouteRequest("decode", [1000, *hashes], 1616))
        assert not router.skips_prefill(RouteRequest("decode"))
        choice = router.choose(RouteRequest("decode", hashes, 1600, reads_prompt=True))
        assert (choice.instance.id, choice.overlap_blocks) == ("decode-1", 90)
        assert router.loads()["decode-1", 0].prefill_tokens == 160


async def test_prefill_is_never_skipped_unless_asked_for() -> None:
    async with routing() as router:
        router.members_changed([member("prefill-0"), member("decode-0")], [])
        assert not router.skips_prefill(RouteRequest("decode", [1], 16))


async def test_draining_worker_gets_nothing_new_and_keeps_its_load() -> None:
    async with routing(mode="least_loaded") as router:
        router.members_changed([member(), member("aggregated-1")], [])
        router.choose(RouteRequest("aggregated"))
        router.choose(RouteRequest("aggregated"))
        router.members_changed([member(state="draining")], [])
        assert router.choose(RouteRequest("aggregated")).instance.id == "aggregated-1"
        assert [load.requests for load in router.loads().values()] == [1, 2]


async def test_error_not_foreseen_in_a_sync_is_logged_and_a_gap_starts_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plane = Plane(failures=[ZeroDivisionError("a bug")])
    async with routing(plane) as router:
        router.members_changed([member()], [])
        await until(lambda: "router.task_failed" in caplog.text)
        router.on_kv(plane.publish(Stored([1])))
        plane.publish(Stored([2]))
        router.on_kv(plane.publish(Stored([3])))
        await synced(router)
        assert overlap(router, [1, 2, 3]) == 3
