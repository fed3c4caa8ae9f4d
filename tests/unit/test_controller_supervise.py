"""The supervisor: events in, instructions out."""

from __future__ import annotations

from typing import Any

from dynctl.controller.moves import (
    Begin,
    Exited,
    Gone,
    Kill,
    Seen,
    Start,
    Started,
    StartFailed,
    Terminate,
)
from dynctl.controller.supervise import Times
from tests.unit.supervise_bench import Bench, seat, words

TIMES = Times()


def test_all_processes_are_started_at_once_and_make_the_deployment_ready() -> None:
    bench = Bench(begin=False)
    assert bench.tell(Begin()) == [Start("frontend-0", 1), Start("decode-0", 1)]
    assert bench.phase() == "starting"
    bench.ready("frontend-0")
    assert bench.phase() == "starting"
    assert bench.state.reason == "decode-0 is starting"
    bench.ready("decode-0")
    assert (bench.phase(), bench.state.reason, bench.state.ready_once) == ("ready", "", True)
    assert bench.seat().url == "http://x"
    assert bench.seat().engine_pid == 7


def test_a_crash_after_ready_degrades_and_restarts_with_a_new_incarnation() -> None:
    bench = Bench()
    bench.ready()
    assert bench.exit() == [Kill("decode-0", 1)]
    assert bench.phase() == "degraded"
    assert bench.state.reason == "decode-0 will be restarted: killed by SIGKILL"
    assert bench.after(0.9) == []
    assert bench.after(0.1) == [Kill("decode-0", 1), Start("decode-0", 2)]
    assert bench.state.reason == "decode-0 is starting again: killed by SIGKILL"
    bench.ready("decode-0")
    assert bench.phase() == "ready"
    assert bench.seat().restarts == 1


def test_back_off_doubles_to_thirty_seconds_and_is_reset_by_a_stable_minute() -> None:
    bench = Bench()
    delays = []
    for _ in range(7):
        bench.ready()
        bench.exit()
        before = bench.now
        while bench.seat().state == "backoff":
            bench.after(0.5)
        delays.append(bench.now - before)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    bench.ready()
    bench.after(TIMES.stable_s)
    bench.exit()
    bench.after(1.0)
    assert bench.seat().state == "starting"


def test_dying_at_start_twice_for_the_same_reason_fails_the_deployment() -> None:
    bench = Bench()
    bench.ready("frontend-0")
    bench.exit(code=1, words=words("out of memory at 0x7f12: 123 bytes"))
    assert bench.seat().state == "backoff"
    bench.after(1.0)
    got = bench.exit(code=1, words=words("out of memory at 0x8a: 7 bytes"))
    assert bench.seat().state == "failed"
    assert bench.seat().last_error == ["boom"]
    assert Terminate("frontend-0") in got
    assert bench.phase() == "stopping"
    bench.exit("frontend-0", 0)
    assert bench.finished
    assert bench.phase() == "failed"
    assert bench.state.reason == "decode-0 gave up: out of memory at 0x8a: 7 bytes"


def test_a_start_that_says_trying_again_is_useless_is_not_tried_again() -> None:
    bench = Bench()
    bench.exit(code=1, words=words(permanent=True))
    assert bench.seat().state == "failed"


def test_a_port_in_use_at_the_first_start_is_not_tried_again() -> None:
    bench = Bench()
    bench.exit(code=1, words=words("port 1 is taken", kind="port_in_use"))
    assert bench.seat().state == "failed"
    assert bench.seat().last_kind == "port_in_use"


def test_different_reasons_are_tried_five_times() -> None:
    bench = Bench()
    for attempt in range(4):
        bench.exit(code=1, words=words(f"reason {'abcd'[attempt]}"))
        assert bench.seat().state == "backoff"
        bench.after(30.0)
    bench.exit(code=1, words=words("reason e"))
    assert bench.seat().state == "failed"


def test_being_killed_from_outside_at_start_twice_is_no_reason_to_give_up() -> None:
    bench = Bench()
    for _ in range(2):
        bench.exit()
        assert bench.seat().state == "backoff"
        bench.after(30.0)


def test_giving_up_once_it_has_been_ready_keeps_the_rest_serving() -> None:
    bench = Bench()
    bench.ready()
    bench.exit()
    bench.after(1.0)
    bench.exit(code=1, words=words(permanent=True))
    assert bench.seat().state == "failed"
    assert bench.phase() == "degraded"
    assert bench.state.reason == "decode-0 gave up: no memory"
    assert not bench.supervisor.stopping


def test_a_program_that_cannot_be_started_gives_up() -> None:
    bench = Bench(begin=False)
    bench.tell(Begin(), start=False)
    bench.tell(StartFailed("decode-0", 1, "no such program", permanent=True))
    assert bench.seat().state == "failed"
    assert bench.seat().last_exit == "no such program"


def test_a_full_disk_at_a_restart_is_waited_out() -> None:
    bench = Bench()
    bench.ready()
    bench.exit()
    for _ in range(9):
        bench.after(30.0, start=False)
        bench.tell(StartFailed("decode-0", bench.seat().incarnation, "disk full", permanent=False))
        assert bench.seat().state == "backoff"


def test_a_hung_start_is_killed_and_told() -> None:
    bench = Bench()
    bench.ready("frontend-0")
    assert bench.after(100.0 + TIMES.start_margin_s) == [Kill("decode-0", 1)]
    assert bench.after(1.0) == []
    bench.exit(code=-9, lines="loading\n")
    assert bench.seat().last_exit == "it was not ready within 130 s"
    assert bench.seat().last_error == ["loading"]


def test_a_lost_lease_may_come_back() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Gone("decode-0", 1))
    assert bench.seat().state == "lost"
    assert bench.phase() == "degraded"
    bench.after(TIMES.renew_s - 1)
    bench.ready("decode-0")
    assert bench.phase() == "ready"


def test_a_process_that_lost_its_lease_for_good_is_killed_and_restarted() -> None:
    bench = Bench()
    bench.ready()
    bench.tell(Gone("decode-0", 1))
    assert bench.after(TIMES.renew_s) == [Kill("decode-0", 1)]
    bench.exit(code=-9)
    assert bench.seat().last_exit == "its lease ran out and it did not register again"
    assert bench.seat().state == "backoff"


def test_a_drain_asked_for_from_outside_is_shown_and_ends_in_a_restart() -> None:
    bench = Bench()
    bench.ready()
    for _ in range(2):
        bench.tell(Seen("decode-0", 1, "draining", "http://x", 7))
    assert bench.noted().count("process.draining") == 1
    assert bench.seat().state == "draining"
    bench.tell(Gone("decode-0", 1))
    assert bench.seat().state == "draining"
    bench.exit(code=0)
    assert bench.seat().state == "backoff"


def test_news_of_a_superseded_incarnation_change_nothing() -> None:
    bench = Bench()
    bench.ready()
    bench.exit()
    bench.after(1.0)
    assert bench.seat().incarnation == 2
    for event in (
        Seen("decode-0", 1, "ready", "http://old", 1),
        Gone("decode-0", 1),
        Exited("decode-0", 1, 0),
        Started("decode-0", 1, 5, 5, 5, 0.0),
        StartFailed("decode-0", 1, "x", permanent=True),
    ):
        assert bench.tell(event) == []
    assert bench.seat().state == "starting"
    assert bench.seat().url == ""
    assert bench.tell(Seen("decode-9", 1, "ready", "", 0)) == []


def test_a_follower_is_ready_when_it_runs() -> None:
    bench = Bench(seat("frontend-0", "frontend"), seat("decode-0"), seat("decode-0.1", follower=True))
    assert bench.seat("decode-0.1").state == "ready"


def test_a_new_controller_adopts_the_living_and_starts_what_is_missing() -> None:
    living: dict[str, Any] = {
        "pid": 5,
        "start_ticks": 1,
        "incarnation": 3,
        "was_ready": True,
        "ever_ready": True,
    }
    bench = Bench(
        seat("frontend-0", "frontend", **living),
        seat("decode-0", **living),
        seat("decode-1", **living, state="failed", failed_starts=2, failure="x"),
        seat("decode-1.1", **living, follower=True),
        begin=False,
    )
    bench.state.ready_once = True
    got = bench.tell(Begin(frozenset({"frontend-0", "decode-0", "decode-1.1"})))
    assert got == [Kill("decode-1", 3), Start("decode-1", 4)]
    assert bench.phase() == "degraded"
    assert bench.seat("decode-1").restarts == 1
    assert bench.seat("decode-1.1").state == "ready"
    bench.ready("frontend-0", "decode-0", "decode-1")
    assert bench.phase() == "ready"


def test_an_adopted_process_that_never_renews_is_ended() -> None:
    living: dict[str, Any] = {
        "pid": 5,
        "start_ticks": 1,
        "incarnation": 3,
        "was_ready": True,
        "ever_ready": True,
    }
    bench = Bench(seat("decode-0", **living), begin=False)
    bench.tell(Begin(frozenset({"decode-0"})))
    assert bench.after(TIMES.renew_s) == [Kill("decode-0", 3)]


def test_an_adopted_process_is_not_said_to_start_again_for_what_it_once_exited_with() -> None:
    living: dict[str, Any] = {"pid": 5, "start_ticks": 1, "incarnation": 3, "was_ready": True}
    bench = Bench(seat("decode-0", **living, last_exit="exited with code 0"), begin=False)
    bench.state.ready_once = True
    bench.tell(Begin(frozenset({"decode-0"})))
    assert bench.state.reason == "decode-0 has not registered with the new controller yet"


def test_an_adopted_process_that_was_still_starting_keeps_its_time() -> None:
    bench = Bench(seat("decode-0", pid=5, start_ticks=1, incarnation=1), begin=False)
    bench.tell(Begin(frozenset({"decode-0"})))
    assert bench.after(TIMES.renew_s) == []
    assert bench.after(110.0) == [Kill("decode-0", 1)]


def test_a_new_controller_gives_a_seat_its_tries_anew() -> None:
    """Else a seat that gave up once under the former controller would be given up at its first failure."""
    said = words("no memory")
    first = Bench()
    first.exit(code=1, words=said)
    again = Bench(first.seat("frontend-0"), first.seat())
    again.exit(code=1, words=said)
    assert again.seat().state == "backoff"
