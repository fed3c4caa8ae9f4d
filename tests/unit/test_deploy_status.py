"""What a state means: rows, counts, diagnosis."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dynctl.deploy.state import ControllerRecord, RunState, SeatRecord
from dynctl.deploy.status import Diagnosis, diagnose, ready_counts, view_of
from dynctl.launchers.last_lines import first_error, telling_lines
from dynctl.protocol.deployment import DeploymentView


def seat(seat_id: str, pid: int = 10, **fields: Any) -> SeatRecord:
    role, _, index = seat_id.partition("-")
    return SeatRecord(
        id=seat_id,
        kind="frontend" if role == "frontend" else "worker",
        role=role,
        index=int(index.split(".")[0]),
        node="n",
        start_timeout_s=1.0,
        pid=pid,
        start_ticks=1,
        incarnation=1,
        **{"state": "ready", **fields},
    )


def view(
    *seats: SeatRecord, controller: int = 1, dead: tuple[int, ...] = (), **fields: Any
) -> DeploymentView:
    state = RunState(
        name="d",
        run_id="r",
        url="http://h",
        registry="g",
        backend="b",
        model="m",
        roles=fields.pop("roles", {"decode": 1}),
        created_at=0.0,
        seats=list(seats),
        controller=ControllerRecord(pid=controller, start_ticks=1),
        **{"phase": "ready", **fields},
    )
    return view_of(state, "/run", lambda pid, _: pid not in dead)


def test_all_is_well() -> None:
    seen = view(seat("frontend-0"), seat("decode-0"))
    assert ready_counts(seen) == "1/1D"
    assert diagnose(seen, {}) == Diagnosis()
    assert seen.controller_pid == 1


def test_a_process_that_is_gone_has_no_pid_and_is_not_ready() -> None:
    seen = view(seat("decode-0", 10, engine_pid=11), dead=(10,))
    row = seen.processes[0]
    assert (row.pid, row.engine_pid, row.ready, row.state) == (0, 0, False, "ready")


def test_without_a_controller_what_lives_still_counts() -> None:
    seen = view(seat("frontend-0", 5), seat("decode-0", 10), seat("decode-1", 12), dead=(1, 12))
    assert (seen.phase, seen.controller_pid) == ("degraded", 0)
    assert [row.state for row in seen.processes] == ["ready", "ready", "stopped"]
    assert diagnose(seen, {}).layer == "controller"


def test_without_anything_alive_it_is_stopped() -> None:
    seen = view(seat("frontend-0", 5), seat("decode-0", 0, state="failed"), dead=(1, 5), phase="starting")
    assert (seen.phase, seen.reason) == ("stopped", "its processes are gone")
    assert [row.state for row in seen.processes] == ["stopped", "failed"]


def test_counts_are_by_role_and_whole_replicas() -> None:
    seats = [
        seat("frontend-0"),
        seat("prefill-0"),
        seat("prefill-1", state="starting"),
        seat("decode-0"),
        seat("decode-0.1", state="starting"),
    ]
    assert ready_counts(view(*seats, roles={"prefill": 2, "decode": 1})) == "1/2P 0/1D"
    assert ready_counts(view(seat("aggregated-0"), roles={"aggregated": 2})) == "1/2"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"state": "starting"}, "decode-0 is starting"),
        ({"state": "starting", "last_exit": "oops"}, "decode-0 is starting again: oops"),
        ({"state": "backoff", "last_exit": "oops"}, "decode-0 waits to be restarted: oops"),
        ({"state": "failed", "last_exit": "oops"}, "decode-0 gave up: oops"),
        ({"state": "lost"}, "decode-0 is lost"),
    ],
)
def test_the_first_failing_layer_is_the_workers(fields: dict[str, Any], reason: str) -> None:
    seen = view(
        seat("frontend-0", state="starting"),
        seat("decode-0", last_error=["fine", "ValueError: x"], **fields),
        phase="degraded",
    )
    assert diagnose(seen, {"frontend-0": "bad"}) == Diagnosis("worker", reason, "decode-0", "ValueError: x")


def test_then_come_frontends_and_their_health() -> None:
    seen = view(seat("frontend-0", state="starting"), seat("decode-0"), phase="starting")
    assert diagnose(seen, {}).layer == "frontend"
    seen = view(seat("frontend-0"), seat("frontend-1"), seat("decode-0"))
    health = {"frontend-0": "", "frontend-1": "no worker of role decode"}
    assert diagnose(seen, health) == Diagnosis("health", "no worker of role decode", "frontend-1")
    assert diagnose(view(seat("decode-0"), phase="stopping"), {}).reason == "it is stopping"


def test_an_ended_deployment_says_why() -> None:
    assert diagnose(view(seat("decode-0"), phase="stopped"), {}) == Diagnosis("deployment", "it was stopped")
    failed = view(
        seat("decode-0", 0, state="failed", last_error=["a"]), phase="failed", reason="decode-0 gave up: x"
    )
    assert diagnose(failed, {}) == Diagnosis("deployment", "decode-0 gave up: x", "decode-0", "a")


def test_the_telling_lines_of_a_log() -> None:
    log = ["starting", "", "RuntimeError: bad", "waiting", "CRITICAL stop\n"]
    assert telling_lines(log, 5) == ["RuntimeError: bad", "CRITICAL stop"]
    assert telling_lines(log, 1) == ["CRITICAL stop"]
    assert telling_lines(["a", "b"], 1) == ["b"]
    assert first_error(["a", "OSError: x"]) == "OSError: x"
    assert first_error(["a"]) == "a"
    assert first_error([]) == ""


def test_a_node_that_does_not_answer_is_told_though_all_serves() -> None:
    seen = msgspec.structs.replace(
        view(seat("frontend-0"), seat("decode-0")),
        unseen={"n": "its agent does not answer (4 s)", "n9": "its agent does not answer (8 s)"},
    )
    found = diagnose(seen, {})
    assert found.layer == "node"
    assert found.reason == (
        "n: its agent does not answer (4 s); what serves there goes on; n9: its agent does not answer (8 s)"
    )
    assert found.ready, "whoever waits for ready need not wait for that"
    assert not diagnose(seen, {"frontend-0": "no worker"}).ready, "what does not serve comes first"


def test_what_is_lost_with_its_node_is_told_with_that() -> None:
    seen = view(seat("frontend-0"), seat("decode-0", state="lost"), phase="degraded")
    seen = msgspec.structs.replace(seen, unseen={"n": "its agent does not answer (4 s)"})
    found = diagnose(seen, {})
    assert (found.layer, found.reason) == ("worker", "decode-0 is lost (n: its agent does not answer (4 s))")
