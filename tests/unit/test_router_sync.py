"""How a router follows what its workers hold: gaps, reloads, restarts, and its doubts."""

from __future__ import annotations

import logging

import pytest

from dynctl.errors import DynctlError, PeerLost
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.kv_events import (
    KV_TOPIC,
    LOAD_TOPIC,
    Cleared,
    KvBatch,
    Stored,
)
from dynctl.router.follow import SyncTiming
from tests.unit.router_rig import Plane, member, overlap, routing, synced, until


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
