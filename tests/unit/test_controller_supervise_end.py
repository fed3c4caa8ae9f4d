"""The supervisor on the way down, and with lost nodes."""

from __future__ import annotations

import pytest

from dynctl.controller.moves import (
    Begin,
    Finish,
    Gone,
    Kill,
    Moved,
    NodeBack,
    NodeLost,
    Seen,
    Start,
    Started,
    Stop,
    Terminate,
    Tick,
)
from dynctl.controller.supervise import Supervisor, Times
from dynctl.deploy.state import LEAST_STOP_MARGIN_S
from dynctl.errors import NodeSilent
from tests.unit.supervise_bench import Bench, seat

TIMES = Times()


def test_down_ends_frontends_before_workers() -> None:
    bench = Bench()
    bench.ready()
    assert bench.tell(Stop(5.0)) == [Terminate("frontend-0")]
    assert bench.phase() == "stopping"
    assert bench.exit("frontend-0", 0) == [Kill("frontend-0", 1), Terminate("decode-0")]
    assert bench.seat("frontend-0").state == "stopped"
    bench.ready("decode-0")
    assert bench.seat().state == "stopping"
    assert bench.exit("decode-0", 0) == [Kill("decode-0", 1), Finish()]
    assert bench.phase() == "stopped"
    assert bench.after(99.0) == []


def test_down_gives_an_engine_the_time_to_exit_that_its_recipe_says() -> None:
    bench = Bench(seat("decode-0", stop_timeout_s=60.0))
    bench.ready("decode-0")
    assert bench.tell(Stop(5.0)) == [Terminate("decode-0")]
    assert bench.after(5.0 + 60.0) == []
    assert bench.after(5.0) == [Kill("decode-0", 1)]


def test_down_kills_what_does_not_end_in_time() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Stop(5.0))
    assert bench.after(5.0 + LEAST_STOP_MARGIN_S - 0.1) == []
    assert bench.after(0.1) == [Kill("frontend-0", 1), Kill("decode-0", 1)]
    bench.exit("frontend-0")
    bench.exit("decode-0")
    assert bench.finished


def test_down_gives_up_on_what_cannot_be_killed() -> None:
    bench = Bench()
    bench.ready()
    assert bench.tell(Stop(0.0)) == [Kill("frontend-0", 1), Kill("decode-0", 1)]
    assert bench.after(TIMES.kill_s) == [Finish()]


def test_a_second_down_only_makes_it_sooner() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Stop(30.0))
    assert bench.tell(Stop(60.0)) == []
    assert bench.tell(Stop(1.0)) == []
    assert bench.after(1.0 + LEAST_STOP_MARGIN_S) == [Kill("frontend-0", 1), Kill("decode-0", 1)]


def test_down_twice_with_nothing_left_to_wait_kills_at_once() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Stop(30.0))
    assert bench.tell(Stop(0.0)) == [Kill("frontend-0", 1), Kill("decode-0", 1)]


def test_down_does_not_start_what_waits_to_be_restarted() -> None:
    bench = Bench()
    bench.ready()
    bench.exit()
    bench.tell(Stop(5.0))
    assert bench.seat().state == "stopped"
    assert bench.after(5.0) == []


def test_down_with_nothing_alive_ends_at_once() -> None:
    bench = Bench(begin=False)
    assert bench.tell(Stop(5.0)) == [Finish()]


def test_a_start_that_hangs_while_frontends_drain_is_left_to_the_way_down() -> None:
    bench = Bench()
    bench.ready("frontend-0")
    bench.tell(Stop(1000.0))
    assert bench.after(500.0) == []
    assert bench.exit("frontend-0", 0) == [Kill("frontend-0", 1), Terminate("decode-0")]


def test_a_process_that_was_being_started_when_the_way_down_began_is_not_left_over() -> None:
    bench = Bench(seat("decode-0"), begin=False)
    (begun,) = bench.tell(Begin(), start=False)
    assert isinstance(begun, Start)
    bench.tell(Stop(1.0))
    assert bench.finished
    late = bench.tell(Started("decode-0", 1, pid=7, start_ticks=7, pgid=7, wall_s=0.0))
    assert late == [Kill("decode-0", 1)]
    assert bench.state.seats[0].pid == 0


def test_what_a_lost_node_had_is_started_elsewhere_and_its_old_self_is_nobody() -> None:
    bench = Bench(seat("decode-0"), seat("decode-1"))
    bench.ready("decode-0", "decode-1")
    bench.state.seats[1].node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    assert [one.state for one in bench.state.seats] == ["ready", "ready"], "its lease is still renewed"
    bench.tell(Gone("decode-1", 1))
    assert Start("decode-1", 2) in bench.tell(Moved({"decode-1": "n3"}))
    assert bench.state.seats[1].node == "n3"
    bench.tell(Seen("decode-1", 1, "ready", "http://old", 5))
    assert bench.state.seats[1].state == "starting", "the one on the lost node is superseded"
    bench.tell(NodeBack("n2"))
    assert bench.state.seats[1].node == "n3"


def test_an_agent_that_dies_alone_loses_no_worker_that_renews_its_lease() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(NodeLost("n", "no answer"))
    assert bench.after(1000.0) == []
    assert (bench.state.phase, bench.seat().state) == ("ready", "ready")


def test_a_part_without_a_lease_is_lost_with_its_node_and_back_with_it() -> None:
    bench = Bench(seat("decode-0"), seat("decode-0.1", follower=True))
    bench.ready("decode-0")
    bench.state.seats[1].node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    assert [one.state for one in bench.state.seats] == ["ready", "lost"]
    bench.tell(NodeBack("n2"))
    assert [one.state for one in bench.state.seats] == ["ready", "ready"]


@pytest.mark.parametrize("was", ["starting", "ready"])
def test_a_start_on_a_node_that_is_lost_before_all_was_ready_fails_long_before_an_engine_is_late(
    was: str,
) -> None:
    bench = Bench(seat("frontend-0", "frontend"), seat("decode-0"), seat("decode-1"))
    bench.ready("frontend-0", *(["decode-0"] if was == "ready" else []))
    bench.seat().node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    bench.tell(Gone("decode-0", 1))
    assert bench.after(29.0) == [], "it may be back"
    bench.after(2.0)
    assert bench.seat().state in ("failed", "stopped")
    assert bench.state.reason == "decode-0 gave up: n2: no answer", "once, and where"
    assert bench.seat().last_kind == NodeSilent.kind


def test_a_restart_on_a_node_that_is_lost_waits_for_another_node() -> None:
    bench = Bench()
    bench.ready()
    bench.exit("decode-0", 1)
    bench.after(2.0)
    bench.seat().node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    bench.after(131.0)
    assert bench.seat().state == "backoff"
    assert any(isinstance(one, Start) for one in bench.tell(Moved({"decode-0": "n3"})))


def test_what_waits_for_a_node_that_does_not_answer_says_so() -> None:
    bench = Bench(seat("decode-0"), seat("decode-1"))
    bench.ready("decode-0", "decode-1")
    bench.tell(NodeLost("n", "no answer"))
    bench.seat("decode-1").asked = "leave"
    bench.after(0.1)
    assert bench.state.changing == "decode-1 leaves (its node n does not answer)"


def test_the_way_down_does_not_wait_for_what_a_lost_node_has() -> None:
    bench = Bench(seat("frontend-0", "frontend"), seat("decode-0"), seat("decode-1"))
    bench.ready("frontend-0", "decode-0", "decode-1")
    bench.state.seats[2].node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    bench.tell(Stop(30.0))
    bench.exit("frontend-0", 0)
    assert Terminate("decode-1") not in bench.exit("decode-0", 0)
    assert bench.finished
    assert "process.left_behind" in bench.noted()


def test_an_engine_that_stops_answering_shows_and_comes_back() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Seen("decode-0", 1, "silent", "http://x", 7))
    assert bench.seat().state == "silent"
    assert bench.noted().count("process.silent") == 1
    bench.tell(Seen("decode-0", 1, "ready", "http://x", 7))
    assert bench.seat().state == "ready"


def test_what_a_new_controller_finds_on_a_node_that_does_not_answer_may_be_moved() -> None:
    bench = Bench(seat("decode-0"), seat("decode-1"))
    bench.ready("decode-0", "decode-1")
    state = bench.state
    for one, node in zip(state.seats, ("n1", "n2"), strict=True):
        one.node = node
    taken_over = Supervisor(state)
    taken_over.handle(Begin(frozenset({"decode-0"})), 0.0)
    assert [one.state for one in state.seats] == ["starting", "starting"]
    taken_over.handle(NodeLost("n1", "no answer"), 1.0)
    taken_over.handle(NodeLost("n2", "no answer"), 1.0)
    assert [one.state for one in state.seats] == ["lost", "backoff"]


def test_who_awaits_a_node_is_not_started_and_does_not_make_it_degraded() -> None:
    bench = Bench(seat("decode-0"))
    bench.ready("decode-0")
    waiting = seat("decode-1", digest="d")
    waiting.node = "node+1"
    bench.state.seats.append(waiting)
    assert bench.tell(Tick()) == []
    assert (bench.phase(), bench.state.changing) == ("ready", "decode-1 awaits a node")
    again = Supervisor(bench.state)
    started = [one.id for one in again.handle(Begin(), 0.0) if isinstance(one, Start)]
    assert started == ["decode-0"]
    assert waiting.state == "waiting"


def test_what_ends_with_its_node_is_no_failed_try_and_starts_where_there_is_room() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(NodeLost("n", "job 8, which gave it, has ended"))
    bench.exit("decode-0", 1)
    assert (bench.seat().state, bench.seat().failed_starts, bench.seat().pid) == ("backoff", 0, 0)
    assert "process.backoff" not in bench.noted()
    assert bench.after(60.0) == [], "not there"
    assert Start("decode-0", 2) in bench.tell(Moved({"decode-0": "n3"}))
    bench.ready("decode-0")
    bench.exit("decode-0", 1)
    assert [note.fields["delay_s"] for note in bench.notes if note.event == "process.backoff"] == [1.0]


def test_what_ended_with_its_node_is_started_at_once_when_that_is_back() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(NodeLost("n", "no answer"))
    bench.exit("decode-0", 1)
    bench.tell(NodeBack("n"))
    assert Start("decode-0", 2) in bench.after(0.1)


def test_the_event_that_it_is_ready_tells_where() -> None:
    bench = Bench()
    bench.ready()
    (told,) = [note.fields for note in bench.notes if note.event == "deployment.ready"]
    assert told == {"url": "http://h"}
