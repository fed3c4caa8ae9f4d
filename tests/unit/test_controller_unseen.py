"""Nodes that do not answer the controller: which are shown, and as what."""

from __future__ import annotations

from dynctl.controller.unseen import Unseen, rooms, shown
from dynctl.launchers.fleet import NodeNews
from tests.unit.supervise_bench import run_state, seat

LOST = {
    "n2": Unseen.of(NodeNews("n2", False, "its agent does not answer", 3.0), 100.0),
    "n7": Unseen("job 8 was cancelled", 1.0),
}


def test_a_node_is_told_with_how_long_it_has_been_silent() -> None:
    assert shown(LOST, run_state(), ["n2"], 101.0) == {"n2": "its agent does not answer (4 s)"}


def test_nodes_that_were_given_back_are_shown_only_while_something_is_there() -> None:
    assert shown(LOST, run_state(), (), 101.0) == {}
    there = seat("decode-0")
    there.node = "n7"
    assert shown(LOST, run_state(there), (), 101.0) == {"n7": "job 8 was cancelled (100 s)"}


def test_nothing_is_to_be_had_on_them() -> None:
    assert {node: room.lost for node, room in rooms(LOST).items()} == {
        "n2": "its agent does not answer",
        "n7": "job 8 was cancelled",
    }
