"""A running engine goes on in another seat, or else what was to be so is ended and started as ever."""

from __future__ import annotations

import pytest

from dynctl.controller.moves import (
    Begin,
    HandOver,
    HandoverFailed,
    Kill,
    Seen,
    Start,
    Stop,
    Terminate,
)
from dynctl.controller.supervise import HANDOVER_S, HURRY_S
from dynctl.deploy.state import LEAST_STOP_MARGIN_S, SeatRecord
from dynctl.protocol.registry import InstanceState
from tests.unit.supervise_bench import Bench, seat


def built(seat_id: str, **fields: object) -> SeatRecord:
    return seat(seat_id, "frontend" if seat_id.startswith("frontend") else "worker", digest="new", **fields)


class Changing(Bench):
    """Three prefill workers and two for decode that serve, of which the plan makes two and three."""

    def __init__(self, *, begin: bool = True) -> None:
        serving = ("frontend-0", "prefill-0", "prefill-1", "prefill-2", "decode-0", "decode-1")
        super().__init__(*map(built, serving))
        self.ready(*serving)
        self.state.roles = {"prefill": 2, "decode": 3}
        self.state.seats.append(built("decode-2", takes="prefill-2"))
        self.seat("prefill-2").asked = "leave"
        self.engine = self.seat("prefill-2").pid

    def become(self, state: InstanceState = "ready") -> list[object]:
        incarnation = self.seat("decode-2").incarnation
        return [*self.tell(Seen("decode-2", incarnation, state, "http://x", 7))]

    def ids(self) -> list[str]:
        return [one.id for one in self.state.seats]


def test_the_process_is_the_new_seat_s_once_it_registers_as_that() -> None:
    bench = Changing()
    assert bench.after(0.0) == [HandOver("prefill-2", "decode-2", 1)]
    assert bench.state.changing == "prefill-2 becomes decode-2"
    assert bench.after(1.0) == []
    assert bench.become() == []
    assert bench.after(0.1) == []
    taken = bench.seat("decode-2")
    assert (taken.pid, taken.engine_pid, taken.state) == (bench.engine, 7, "ready")
    assert (taken.built, taken.restarts, taken.takes) == ("new", 0, "")
    assert "prefill-2" not in bench.ids()
    assert bench.state.retired == {"prefill-2": 1}
    assert (bench.state.changing, bench.phase()) == ("", "ready")
    assert "process.took_over" in bench.noted()


def test_a_crash_afterwards_clears_all_its_names_and_starts_it_in_the_new_role() -> None:
    bench = Changing()
    bench.after(0.0)
    bench.become()
    assert bench.exit("decode-2") == [Kill("decode-2", 1), Kill("prefill-2", 1)]
    assert bench.after(1.0) == [Kill("decode-2", 1), Kill("prefill-2", 1), Start("decode-2", 2)]
    bench.ready("decode-2")
    assert bench.seat("decode-2").restarts == 1
    assert bench.exit("decode-2") == [Kill("decode-2", 2)]


def test_one_that_goes_back_is_still_known_by_what_its_engine_was_started_as() -> None:
    bench = Changing()
    bench.after(0.0)
    bench.become()
    bench.after(0.1)
    bench.state.seats.append(built("prefill-2", takes="decode-2", incarnation=1))
    bench.seat("decode-2").asked = "leave"
    assert bench.after(0.0) == [HandOver("decode-2", "prefill-2", 2)]
    bench.tell(Seen("prefill-2", 2, "ready", "http://x", 7))
    assert bench.seat("prefill-2").engine_of == ("prefill-2", 1)
    assert bench.seat("prefill-2").pid == bench.engine


def test_a_sidecar_that_will_not_is_ended_and_the_new_seat_starts_one() -> None:
    bench = Changing()
    bench.after(0.0)
    assert bench.tell(HandoverFailed("prefill-2", 1, "no")) == [Terminate("prefill-2")]
    assert bench.after(1.0) == []
    done = bench.exit("prefill-2", 0)
    assert done[:2] == [Kill("prefill-2", 1), Kill("decode-2", 1)]
    assert bench.after(0.1)[-1:] == [Start("decode-2", 2)] or done[-1] == Start("decode-2", 2)
    assert bench.seat("decode-2").restarts == 0
    bench.ready("decode-2")
    bench.after(0.1)
    assert (bench.state.changing, bench.phase()) == ("", "ready")
    assert "prefill-2" not in bench.ids()


def test_one_that_dies_on_the_way_is_replaced_by_a_start() -> None:
    bench = Changing()
    bench.after(0.0)
    done = [*bench.exit("prefill-2"), *bench.after(0.1)]
    assert Start("decode-2", 2) in done
    assert done.index(Kill("decode-2", 1)) < done.index(Start("decode-2", 2))


def test_one_that_takes_too_long_is_told_to_end_and_then_killed_by_either_name() -> None:
    bench = Changing()
    bench.after(0.0)
    limit_s = bench.seat("prefill-2").drain_timeout_s + HURRY_S + HANDOVER_S
    assert bench.after(limit_s - 0.1) == []
    assert bench.after(0.1) == [Terminate("prefill-2")]
    assert bench.after(LEAST_STOP_MARGIN_S) == [Kill("prefill-2", 1), Kill("decode-2", 1)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"state": "silent"}, [Terminate("prefill-2")]),
        ({"built": "old"}, [Terminate("prefill-2")]),  # what runs is not what its plan says
        ({"pid": 0, "state": "backoff"}, []),
    ],
)
def test_only_one_that_is_well_and_as_planned_is_handed_over(
    fields: dict[str, object], expected: list[object]
) -> None:
    bench = Changing()
    for name, value in fields.items():
        setattr(bench.seat("prefill-2"), name, value)
    done = bench.after(0.0)
    assert not [one for one in done if isinstance(one, HandOver)]
    assert [one for one in done if isinstance(one, Terminate)] == expected


def test_nothing_is_started_in_its_place_while_it_lives() -> None:
    """Without GPUs only the port would tell: the new seat's is the same."""
    bench = Changing()
    bench.seat("prefill-2").state = "silent"
    assert bench.after(0.0) == [Terminate("prefill-2")]
    assert bench.after(1.0) == []
    assert Start("decode-2", 1) in [*bench.exit("prefill-2", 0), *bench.after(0.1)]


def test_a_change_of_mind_on_the_way_ends_with_the_seats_that_were_wanted_last() -> None:
    bench = Changing()
    bench.after(0.0)
    bench.seat("prefill-2").asked = "restart"
    bench.seat("prefill-2").takes = "decode-2"
    bench.seat("decode-2").asked = "leave"
    assert bench.after(1.0) == []
    assert "decode-2" in bench.ids()
    assert bench.become() == [Terminate("decode-2")]
    assert bench.after(0.1) == []  # its port is not free yet
    done = [*bench.exit("decode-2", 0), *bench.after(0.1)]
    assert Start("prefill-2", 2) in done
    bench.ready("prefill-2")
    bench.after(0.1)
    assert "decode-2" not in bench.ids()
    assert (bench.state.changing, bench.phase()) == ("", "ready")


def taken_up(bench: Changing, *alive: str) -> Bench:
    """A controller after the one that died, on the state of that."""
    again = Bench(*bench.state.seats, begin=False)
    again.state.ready_once = True
    again.state.roles = dict(bench.state.roles)
    others = {one.id for one in bench.state.seats if one.pid and one.id != "prefill-2"}
    again.tell(Begin(frozenset({*others, *alive})))
    return again


def test_a_new_controller_knows_the_process_by_the_names_it_has_by_now() -> None:
    bench = Changing()
    bench.after(0.0)
    again = taken_up(bench, "decode-2")
    assert again.seat("decode-2").pid == bench.engine
    again.ready(*[one.id for one in again.state.seats if one.pid])
    assert again.after(0.1) == []
    assert again.seat("decode-2").state == "ready"
    assert "prefill-2" not in [one.id for one in again.state.seats]


def test_a_new_controller_waits_for_one_that_is_on_its_way() -> None:
    bench = Changing()
    bench.after(0.0)
    again = taken_up(bench, "prefill-2")
    again.tell(Seen("prefill-2", 1, "draining", "http://x", 7))
    assert again.after(1.0) == []
    again.tell(Seen("decode-2", 1, "ready", "http://x", 7))
    assert again.seat("decode-2").pid == bench.engine


def test_a_new_controller_starts_what_neither_name_lives_of() -> None:
    bench = Changing()
    bench.after(0.0)
    again = taken_up(bench)
    assert again.seat("decode-2").state == "starting"
    assert again.seat("decode-2").incarnation == 2


def test_the_way_down_ends_one_that_is_on_its_way() -> None:
    bench = Changing()
    bench.after(0.0)
    bench.tell(Stop(5.0))
    done = bench.exit("frontend-0", 0)
    assert Terminate("prefill-2") in done
    late = bench.after(5.0 + LEAST_STOP_MARGIN_S)
    assert {Kill("prefill-2", 1), Kill("decode-2", 1)} <= set(late)
