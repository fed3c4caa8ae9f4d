"""Which lost nodes' workers go elsewhere."""

from __future__ import annotations

from dynctl.controller.moving import stranded
from tests.unit.supervise_bench import run_state, seat


def test_nodes_whose_workers_are_gone_are_left_each_for_itself() -> None:
    state = run_state(seat("decode-0"), seat("decode-1"), seat("decode-2"))
    for one, node in zip(state.seats, ("n1", "n2", "n3"), strict=True):
        one.node, one.state = node, "lost"
    assert stranded(state, ()) == frozenset()
    assert stranded(state, ("n1", "n2")) == {"n1", "n2"}
    state.seats[1].state = "backoff"
    assert stranded(state, ("n1", "n2")) == {"n1", "n2"}


def test_an_agent_dead_alone_moves_nobody() -> None:
    state = run_state(seat("decode-0"), seat("decode-1"))
    state.seats[0].state, state.seats[1].state = "lost", "ready"
    assert stranded(state, ("n",)) == frozenset(), "decode-1 renews its lease there"
    state.seats[1].state = "lost"
    assert stranded(state, ("n",)) == {"n"}


def test_frontends_stay_where_they_are() -> None:
    state = run_state(seat("frontend-0", "frontend"))
    state.seats[0].state = "lost"
    assert stranded(state, ("n",)) == frozenset()
