from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dynctl.protocol.kv_events import LoadReport
from dynctl.protocol.specs import GuardSpec
from dynctl.router.active import RankLoad
from dynctl.router.guard import crowded
from dynctl.router.shared import SharedBlocks


def loads(*requests: int) -> list[RankLoad]:
    found = []
    for count in requests:
        load = RankLoad(SharedBlocks())
        load.requests = count
        found.append(load)
    return found


def test_switched_off_it_says_nothing() -> None:
    assert crowded(GuardSpec(enabled=False), loads(0, 1000)) is None


def test_few_requests_may_pile_up() -> None:
    assert crowded(GuardSpec(), loads(0, 0, 0, 8)) is None


def test_more_than_share_and_slack_is_crowded() -> None:
    spec = GuardSpec(requests_ratio=1.5, requests_slack=8)
    assert crowded(spec, loads(20, 20, 20, 40)) is None
    assert crowded(spec, loads(20, 20, 20, 52)) == [False, False, False, True]


def test_worker_that_gets_nothing_is_fed_by_those_below_the_mean() -> None:
    assert crowded(GuardSpec(), loads(0, 20, 25, 25)) == [False, True, True, True]


def test_full_worker_has_no_slack() -> None:
    spec = GuardSpec(requests_ratio=1.5, requests_slack=8, kv_usage=0.9)
    full, *others = loads(10, 4, 4, 4)
    full.capacity, full.blocks = 100, 95
    assert crowded(spec, [full, *others]) is None, "nobody waits there"
    full.reported_waiting = 1
    assert crowded(spec, [full, *others]) == [True, False, False, False]
    full.blocks = 80
    assert crowded(spec, [full, *others]) is None


def test_what_an_engine_reports_is_what_counts() -> None:
    full, *others = loads(0, 4, 4, 4)
    full.report(LoadReport("w", 1, 0, running=10, waiting=3, kv_usage=0.99, kv_blocks=100))
    assert crowded(GuardSpec(), [full, *others]) == [True, False, False, False]


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=12),
    st.floats(1.0, 4.0),
    st.integers(0, 20),
    st.booleans(),
)
def test_least_busy_is_never_crowded(requests: list[int], ratio: float, slack: int, full: bool) -> None:
    there = loads(*requests)
    for load in there:
        load.reported_waiting, load.capacity, load.blocks = int(full), 10, 10
    out = crowded(GuardSpec(requests_ratio=ratio, requests_slack=slack), there)
    if out is not None:
        assert not out[requests.index(min(requests))]
        assert any(out)
