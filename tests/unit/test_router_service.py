"""The router of one frontend: who is chosen, what that counts for, what is remembered of it."""

from __future__ import annotations

from typing import Any

import pytest

from dynctl.errors import Rejected, RequestError
from dynctl.kv.hashing import OF_BYTES
from dynctl.protocol.kv_events import (
    KV_TOPIC,
    LOAD_TOPIC,
    LoadReport,
    Stored,
)
from dynctl.protocol.specs import AffinitySpec, ConditionalDisaggSpec
from dynctl.router.request import RouteRequest
from dynctl.router.service import Router
from tests.unit.router_rig import Plane, member, overlap, routing, synced


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


async def test_a_worker_without_an_event_plane_is_followed_by_hand_and_forgotten_when_it_goes() -> None:
    plain: dict[str, Any] = {"events": "", "control": ""}
    async with routing(events="exact") as router:
        router.members_changed([member("aggregated-0", **plain), member("aggregated-1", **plain)], [])
        router.holds("aggregated-1", 0, Stored([1, 2, 3]))
        router.holds("aggregated-9", 0, Stored([1, 2, 3, 4]))
        assert router.cached_tokens([1, 2, 3, 4]) == 3 * 16
        router.members_changed([], ["aggregated-1"])
        assert router.cached_tokens([1, 2, 3, 4]) == 0


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
