"""What is ended and started next while a deployment that serves becomes another."""

from __future__ import annotations

from random import Random
from typing import Any, get_args

from dynctl.controller.moves import Begin, Instruction, Kill, NodeLost, Seen, Start, Terminate
from dynctl.controller.rolling import changing, moves, settled
from dynctl.deploy.state import SeatKind, SeatRecord
from dynctl.protocol.deployment import SeatState
from tests.unit.supervise_bench import Bench, run_state, seat


def built(seat_id: str, **fields: Any) -> SeatRecord:
    """A seat that is started with "new"."""
    kind: SeatKind = "frontend" if seat_id.startswith("frontend") else "worker"
    return seat(seat_id, kind, **{"digest": "new", **fields})


class Rolling(Bench):
    """A deployment that serves."""

    def __init__(self, *seats: SeatRecord, roles: int = 2) -> None:
        super().__init__(*(seats or (built("frontend-0"), built("decode-0"), built("decode-1"))))
        self.state.roles = {"decode": roles}
        self.ready(*(s.id for s in self.state.seats))
        assert self.phase() == "ready"

    def ask(self, wish: Any, *ids: str) -> list[Instruction]:
        for seat_id in ids:
            self.seat(seat_id).asked = wish
        return self.after(0.0)

    def add(self, seat_id: str, **fields: Any) -> list[Instruction]:
        self.state.seats.append(built(seat_id, **fields))
        return self.after(0.0)

    def ids(self) -> list[str]:
        return [s.id for s in self.state.seats]


def started(done: list[Instruction]) -> list[str]:
    return [one.id for one in done if isinstance(one, Start)]


def asked_to_end(done: list[Instruction]) -> list[str]:
    return [one.id for one in done if isinstance(one, Terminate)]


def test_what_is_said_to_be_settled_has_no_moves_and_nothing_to_say() -> None:
    rng, found = Random(1), 0
    for _ in range(3000):
        seats = [
            built(
                seat_id,
                state=rng.choice([*get_args(SeatState), *["ready"] * 9]),
                asked=rng.choice(["restart", "drain", "leave", *[""] * 9]),
                built=rng.choice(["old", *["new"] * 9, ""]),
                pid=rng.choice([0, 7]),
                surge=rng.random() < 0.1,
                rolled=rng.random() < 0.1,
            )
            for seat_id in ("frontend-0", "decode-0", "decode-1")
        ]
        state = run_state(*seats)
        if settled(state):
            found += 1
            assert (moves(state), changing(state)) == ([], ""), state
    assert found > 300


def test_two_workers_of_a_role_are_never_away_at_once() -> None:
    bench = Rolling()
    assert asked_to_end(bench.ask("restart", "decode-0", "decode-1")) == ["decode-0"]
    assert bench.after(1.0) == []
    assert started(bench.exit("decode-0", 0)) == ["decode-0"]
    assert bench.after(1.0) == []
    assert bench.state.changing == "decode-0 is starting, decode-1 is to be replaced"
    bench.ready("decode-0")
    assert bench.seat("decode-1").state == "stopping"
    assert started(bench.exit("decode-1", 0)) == ["decode-1"]
    bench.ready("decode-1")
    assert (bench.state.changing, bench.phase()) == ("", "ready")
    assert [bench.seat(s).restarts for s in ("decode-0", "decode-1")] == [0, 0]


def test_nothing_is_ended_before_its_stand_in_is_ready_and_that_leaves_last() -> None:
    bench = Rolling()
    bench.seat("decode-0").asked = "restart"
    assert started(bench.add("decode-2", surge=True)) == ["decode-2"]
    assert bench.after(5.0) == []
    bench.ready("decode-2")
    assert bench.seat("decode-0").state == "stopping"
    bench.exit("decode-0", 0)
    assert bench.seat("decode-2").state == "ready"
    bench.ready("decode-0")
    bench.after(0.1)
    assert bench.seat("decode-2").state == "stopping"
    bench.exit("decode-2", 0)
    bench.after(0.1)
    assert bench.ids() == ["frontend-0", "decode-0", "decode-1"]
    assert bench.state.retired == {"decode-2": 1}
    assert bench.state.changing == ""


def test_a_stand_in_that_does_not_live_does_not_hold_up_the_change() -> None:
    bench = Rolling()
    bench.seat("decode-0").asked = "restart"
    bench.add("decode-2", surge=True)
    while "decode-2" in bench.ids():
        bench.exit("decode-2", 1, lines="boom")
        bench.after(31.0)
    bench.after(0.1)
    assert bench.seat("decode-0").state in ("stopping", "starting")


def test_a_new_command_that_does_not_live_stops_the_change_at_the_first_replica() -> None:
    bench = Rolling()
    for s in ("decode-0", "decode-1"):
        bench.seat(s).digest = "newer"
    bench.after(0.0)
    bench.exit("decode-0", 0)
    bench.exit("decode-0", 1, lines="no such flag")
    bench.after(1.0)
    bench.exit("decode-0", 1, lines="no such flag")
    assert bench.seat("decode-0").state == "failed"
    assert bench.after(99.0) == []
    assert bench.seat("decode-1").state == "ready"
    assert bench.state.changing == "decode-0 is failed, decode-1 is to be replaced"


def test_going_back_starts_what_failed_at_once_and_leaves_alone_what_never_changed() -> None:
    bench = Rolling()
    for s in ("decode-0", "decode-1"):
        bench.seat(s).digest = "newer"
    bench.after(0.0)
    bench.exit("decode-0", 0)
    for _ in range(2):
        bench.exit("decode-0", 1, lines="no such flag")
        bench.after(1.0)
    for s in ("decode-0", "decode-1"):
        bench.seat(s).digest = "new"
    assert started(bench.after(0.0)) == ["decode-0"]
    bench.ready("decode-0")
    assert (bench.state.changing, bench.seat("decode-1").incarnation) == ("", 1)


def test_what_leaves_is_asked_to_end_forgotten_and_never_started_again() -> None:
    bench = Rolling()
    assert asked_to_end(bench.ask("leave", "decode-1")) == ["decode-1"]
    assert bench.phase() == "ready"
    assert bench.exit("decode-1", 0) == [Kill("decode-1", 1)]
    assert bench.after(99.0) == []
    assert bench.ids() == ["frontend-0", "decode-0"]


def test_a_worker_killed_while_it_drains_stays_out() -> None:
    bench = Rolling()
    bench.ask("drain", "decode-1")
    bench.exit("decode-1", -9)
    assert bench.after(99.0) == []
    assert bench.seat("decode-1").state == "drained"
    assert bench.phase() == "degraded"
    assert bench.state.reason == "decode-1 is drained; dynctl undrain decode-1 brings it back"
    assert started(bench.ask("restart", "decode-1")) == ["decode-1"]


def test_a_drained_worker_stays_out_when_the_controller_is_replaced() -> None:
    bench = Rolling()
    bench.ask("drain", "decode-1")
    bench.exit("decode-1", 0)
    again = Bench(*bench.state.seats, begin=False)
    again.state.ready_once = True
    assert again.tell(Begin(frozenset({"frontend-0", "decode-0"}))) == []
    assert again.seat("decode-1").state == "drained"


def test_a_request_that_does_not_end_is_left_to_others_and_then_the_worker_is_killed() -> None:
    bench = Rolling()
    bench.seat("decode-1").drain_limit_s = 5.0
    bench.ask("drain", "decode-1")
    assert bench.after(6.0) == []
    assert bench.after(1.1) == [Terminate("decode-1")]
    assert bench.after(20.0) == [Kill("decode-1", 1)]
    assert bench.after(20.0) == []


def test_a_new_controller_goes_on_where_the_last_one_stopped() -> None:
    bench = Rolling()
    bench.ask("restart", "decode-0", "decode-1")
    assert bench.seat("decode-0").state == "stopping"
    again = Bench(*bench.state.seats, begin=False)
    again.state.ready_once, again.state.roles = True, {"decode": 2}
    assert again.tell(Begin(frozenset({"frontend-0", "decode-0", "decode-1"}))) == []
    # The controller died on the point of asking: what serves on is asked now, once.
    assert again.tell(Seen("decode-0", 1, "ready", "http://x", 7)) == [Terminate("decode-0")]
    assert again.tell(Seen("decode-0", 1, "ready", "http://x", 7)) == []
    assert again.seat("decode-1").state == "starting"
    again.ready("frontend-0", "decode-1")
    assert again.seat("decode-1").state == "ready"
    assert started(again.exit("decode-0", 0)) == ["decode-0"]
    again.ready("decode-0")
    assert again.seat("decode-1").state == "stopping"


def test_workers_a_new_controller_has_not_heard_of_yet_are_not_taken_for_broken_ones() -> None:
    bench = Rolling()
    for s in bench.state.seats:
        s.asked = "restart"
    again = Bench(*bench.state.seats, begin=False)
    again.state.ready_once = True
    assert again.tell(Begin(frozenset({"frontend-0", "decode-0", "decode-1"}))) == []
    assert again.after(1.0) == []


def test_a_new_replica_waits_for_the_gpu_of_one_that_leaves() -> None:
    bench = Rolling(built("frontend-0"), built("decode-0"), built("decode-1", gpus=[1]))
    bench.state.roles = {"decode": 1, "prefill": 1}
    bench.ask("leave", "decode-1")
    assert bench.add("prefill-0", gpus=[1]) == []
    assert started(bench.exit("decode-1", 0)) == ["prefill-0"]


def test_a_frontend_that_shares_its_port_anew_is_replaced_before_another_joins_it() -> None:
    bench = Rolling()
    bench.seat("frontend-0").digest = "newer"
    assert asked_to_end(bench.add("frontend-1")) == ["frontend-0"]
    assert bench.after(1.0) == []
    assert started(bench.exit("frontend-0", 0)) == ["frontend-0", "frontend-1"]


def test_a_replica_over_two_nodes_ends_head_first_and_starts_whole() -> None:
    bench = Rolling(built("frontend-0"), built("decode-0"), built("decode-0.1", follower=True), roles=1)
    assert asked_to_end(bench.ask("restart", "decode-0", "decode-0.1")) == ["decode-0"]
    assert asked_to_end(bench.exit("decode-0", 0)) == ["decode-0.1"]
    assert started(bench.exit("decode-0.1", 0)) == ["decode-0", "decode-0.1"]


def test_what_is_on_a_node_that_cannot_be_reached_is_left_alone() -> None:
    bench = Rolling()
    bench.tell(NodeLost("n", "no answer"))
    assert bench.ask("restart", "decode-0") == []
    assert bench.ask("leave", "decode-1") == []


def test_a_seat_that_comes_back_is_not_taken_for_its_former_self() -> None:
    bench = Rolling()
    bench.ask("leave", "decode-1")
    bench.exit("decode-1", 0)
    bench.after(0.1)
    assert bench.add("decode-1", incarnation=bench.state.retired["decode-1"])[-1] == Start("decode-1", 2)
