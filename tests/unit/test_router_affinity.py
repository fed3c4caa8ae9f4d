from __future__ import annotations

from dynctl.protocol.specs import AffinitySpec, ConditionalDisaggSpec, GuardSpec
from dynctl.router.active import RankLoad
from dynctl.router.affinity import Sessions
from dynctl.router.conditional import reads_itself
from dynctl.router.request import Candidate, RouteRequest
from dynctl.router.shared import SharedBlocks
from tests.workers import worker_instance


def candidates() -> list[Candidate]:
    found = []
    for number in range(3):
        instance = worker_instance(number)
        found.append(Candidate((instance.id, 0), instance, RankLoad(SharedBlocks())))
    return found


REQUEST = RouteRequest("aggregated", session="s")


def sessions(mode: str, **fields: float) -> Sessions:
    made = Sessions(
        AffinitySpec(mode=mode, ttl_s=fields.get("ttl_s", 10.0), sessions=int(fields.get("most", 9)))
    )
    made.note("aggregated", "s", ("w-1", 0), 0.0)
    return made


def where(
    table: Sessions, there: list[Candidate], now_s: float = 1.0, request: RouteRequest = REQUEST
) -> list[str]:
    return [one.key[0] for one in table.narrowed(request, there, GuardSpec(), now_s)]


def test_off_remembers_nothing() -> None:
    table = sessions("off")
    assert len(where(table, candidates())) == 3
    assert len(table) == 0


def test_session_is_remembered_until_its_time_is_over() -> None:
    table = sessions("soft")
    assert where(table, candidates(), 9.9) == ["w-1"]
    assert len(where(table, candidates(), 10.0)) == 3


def test_each_role_has_its_own_place() -> None:
    assert sessions("soft").place("decode", "s", 1.0) is None


def test_request_without_a_session_goes_anywhere() -> None:
    assert len(where(sessions("soft"), candidates(), request=RouteRequest("aggregated"))) == 3


def test_soft_leaves_a_crowded_worker_and_hard_stays() -> None:
    there = candidates()
    there[1].load.requests = 50
    assert len(where(sessions("soft"), there)) == 3
    assert where(sessions("hard"), there) == ["w-1"]


def test_session_whose_worker_is_gone_goes_anywhere() -> None:
    there = [one for one in candidates() if one.key[0] != "w-1"]
    assert len(where(sessions("hard"), there)) == 2


def test_session_that_is_over_is_forgotten() -> None:
    table = sessions("hard")
    table.note("decode", "s", ("w-0", 0), 0.0)
    table.end("s")
    table.end("never seen")
    assert len(table) == 0


def test_longest_unused_are_forgotten_first() -> None:
    table = sessions("soft", most=2)
    table.note("aggregated", "t", ("w-0", 0), 1.0)
    table.note("aggregated", "s", ("w-1", 0), 2.0)
    table.note("aggregated", "u", ("w-2", 0), 3.0)
    assert table.place("aggregated", "t", 3.0) is None
    assert table.place("aggregated", "s", 3.0) == ("w-1", 0)
    table.note("aggregated", "v", ("w-2", 0), 50.0)
    assert len(table) == 1, "those whose time is over take no room"


def test_short_rest_of_a_prompt_is_read_by_decode() -> None:
    spec = ConditionalDisaggSpec(mode="isl", max_tokens=2048, max_ratio=0.7)
    assert reads_itself(spec, 8000, 6000, 0)
    assert not reads_itself(spec, 8000, 5900, 0), "too many are left"
    assert not reads_itself(spec, 1000, 200, 0), "too large a part is left"
    assert not reads_itself(spec, 0, 0, 0)


def test_busy_prefill_is_skipped_where_load_counts() -> None:
    args = (8000, 0, 100_000)
    assert not reads_itself(ConditionalDisaggSpec(mode="isl"), *args)
    assert reads_itself(ConditionalDisaggSpec(mode="load"), *args)
    assert reads_itself(ConditionalDisaggSpec(mode="either"), *args)
    assert reads_itself(ConditionalDisaggSpec(mode="either"), 8000, 7000, 0)
    assert not reads_itself(ConditionalDisaggSpec(mode="load"), 8000, 7999, 0)
    assert not reads_itself(ConditionalDisaggSpec(mode="off"), 8000, 7999, 100_000)


def test_several_frontends_send_a_session_to_the_same_worker_without_having_met_it() -> None:
    frontends = [sessions("hard"), sessions("hard")]
    requests = [RouteRequest("aggregated", session=f"s-{number}") for number in range(200)]
    for table in frontends:
        table.several = True
    there = candidates()
    homes = [[where(table, there, request=request) for request in requests] for table in frontends]
    assert homes[0] == homes[1]
    assert {len(found) for found in homes[0]} == {1}
    assert {found[0] for found in homes[0]} == {"w-0", "w-1", "w-2"}
    frontends[0].note("aggregated", "s-0", ("w-0", 0), 0.0)
    assert len(frontends[0]) == 1, "what one alone remembers would part it from the others"
    left = [where(frontends[0], there[:2], request=request) for request in requests]
    moved = sum(now != before for now, before in zip(left, homes[0], strict=True))
    assert moved == sum(found == ["w-2"] for found in homes[0]), "only the sessions of the one that is gone"
