"""The supervisor: events in, instructions out."""

from __future__ import annotations

from typing import Any

from dynctl.controller.moves import (
    Begin,
    Event,
    Exited,
    Finish,
    Gone,
    Instruction,
    Kill,
    Moved,
    NodeBack,
    NodeLost,
    Note,
    Seen,
    Start,
    Started,
    StartFailed,
    Stop,
    Terminate,
    Tick,
)
from dynctl.controller.supervise import Supervisor, Times
from dynctl.deploy.state import LEAST_STOP_MARGIN_S, RunState, SeatKind, SeatRecord
from dynctl.protocol.exits import LastWords

TIMES = Times()


def seat(seat_id: str, kind: SeatKind = "worker", **fields: Any) -> SeatRecord:
    role, _, index = seat_id.partition("-")
    number = int(index.split(".")[0])
    return SeatRecord(
        id=seat_id, kind=kind, role=role, index=number, node="n", start_timeout_s=100.0, **fields
    )


def run_state(*seats: SeatRecord) -> RunState:
    return RunState(
        name="d",
        run_id="r",
        url="http://h",
        registry="tcp://h",
        backend="b",
        model="m",
        roles={"decode": 1},
        created_at=0.0,
        seats=list(seats),
    )


class Bench:
    """A supervisor with a clock, whose starts succeed at once unless told otherwise."""

    def __init__(self, *seats: SeatRecord, begin: bool = True) -> None:
        self.state = run_state(*(seats or (seat("frontend-0", "frontend"), seat("decode-0"))))
        self.supervisor = Supervisor(self.state)
        self.now = 1000.0
        self.pid = 100
        self.notes: list[Note] = []
        self.finished = False
        if begin:
            self.tell(Begin())

    def tell(self, event: Event, *, start: bool = True) -> list[Instruction]:
        """The instructions but notes; starts are answered with Started."""
        done: list[Instruction] = []
        for instruction in self.supervisor.handle(event, self.now):
            if isinstance(instruction, Note):
                self.notes.append(instruction)
                continue
            done.append(instruction)
            self.finished = self.finished or isinstance(instruction, Finish)
            if isinstance(instruction, Start) and start:
                self.pid += 1
                started = Started(instruction.id, instruction.incarnation, self.pid, 1, self.pid, 0.0)
                done += self.tell(started)
        return done

    def after(self, seconds: float, *, start: bool = True) -> list[Instruction]:
        self.now += seconds
        return self.tell(Tick(), start=start)

    def seat(self, seat_id: str = "decode-0") -> SeatRecord:
        found = self.state.seat(seat_id)
        assert found is not None
        return found

    def phase(self) -> str:
        return self.state.phase

    def ready(self, *ids: str) -> None:
        for seat_id in ids or ("frontend-0", "decode-0"):
            self.tell(Seen(seat_id, self.seat(seat_id).incarnation, "ready", "http://x", 7))

    def exit(
        self,
        seat_id: str = "decode-0",
        code: int | None = -9,
        words: LastWords | None = None,
        lines: str = "",
    ) -> list[Instruction]:
        kept = tuple(lines.splitlines())
        return self.tell(Exited(seat_id, self.seat(seat_id).incarnation, code, words, kept))

    def noted(self) -> list[str]:
        return [note.event for note in self.notes]


def words(message: str = "no memory", kind: str = "launch", **fields: Any) -> LastWords:
    return LastWords(id="decode-0", incarnation=1, kind=kind, message=message, lines=["boom"], **fields)


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


def test_a_start_on_a_node_that_is_lost_before_it_was_ready_fails_in_the_end() -> None:
    bench = Bench()
    bench.ready("frontend-0")
    bench.seat().node = "n2"
    bench.tell(NodeLost("n2", "no answer"))
    assert bench.after(100.0) == []
    bench.after(31.0)
    assert bench.seat().state in ("failed", "stopped")
    assert "node n2 cannot be reached (no answer)" in bench.state.reason


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
