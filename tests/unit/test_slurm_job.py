"""A deployment's job from the login node: when it is pending, runs, has ended, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from dynctl.deploy.home import RunDir
from dynctl.deploy.slurm_view import ended_text, job_facts, job_view, pending_text, refuse_hopeless
from dynctl.deploy.state import ControllerRecord, RunState, SeatRecord
from dynctl.errors import SlurmError, SlurmRejected, SlurmUnreachable
from dynctl.launchers.slurm_client import JobRow, SlurmClient
from dynctl.launchers.slurm_follow import FollowUp, save_follow_ups
from dynctl.launchers.slurm_job import JobLauncher, JobRecord, JobTable, load_record
from dynctl.protocol.exits import LastWords


@dataclass(frozen=True)
class Answers(SlurmClient):
    """Instead of Slurm: a list of jobs, or an error."""

    rows: list[JobRow] = field(default_factory=list)
    failing: list[SlurmError] = field(default_factory=list)
    calls: list[list[str]] = field(default_factory=list)

    def jobs(self, names: Iterable[str]) -> list[JobRow]:
        self.calls.append(sorted(names))
        if self.failing:
            raise self.failing[0]
        return list(self.rows)

    def place_in_queue(self, job: JobRow) -> tuple[int, int]:
        return 3, 9


RECORD = JobRecord(job_id="7", name="demo-1", submitted_at=0.0)


def row(state: str, **more: str) -> JobRow:
    return JobRow(**{"id": "7", "name": "demo-1", "partition": "gpu", "state": state, **more})  # type: ignore[arg-type]


def launcher(
    tmp_path: Path, *rows: JobRow, failing: Sequence[SlurmError] = (), at: float = 0.0
) -> JobLauncher:
    client = Answers(rows=list(rows), failing=list(failing))
    record = JobRecord(job_id="7", name="demo-1", submitted_at=at)
    return JobLauncher(JobTable(client, [record]), record, tmp_path)


def state(**more: object) -> RunState:
    seat = SeatRecord(
        id="decode-0",
        kind="worker",
        role="decode",
        index=0,
        node="n1",
        start_timeout_s=1,
        state="ready",
        pid=5,
    )
    given: dict[str, object] = {
        "name": "demo",
        "run_id": "demo-1",
        "url": "http://n1:1",
        "registry": "tcp://n1:2",
        "backend": "mocker",
        "model": "m",
        "roles": {"decode": 1},
        "created_at": 0.0,
        "seats": [seat],
        "phase": "ready",
        "ready_once": True,
        "controller": ControllerRecord(pid=4, start_ticks=1, incarnation=1),
        **more,
    }
    return RunState(**given)  # type: ignore[arg-type]


def test_another_job_with_the_same_id_is_not_ours(tmp_path: Path) -> None:
    ours = launcher(tmp_path, row("RUNNING", name="someone-else"))
    assert ours.job() is None
    assert ours.over()


def test_another_job_with_the_same_name_is_not_ours(tmp_path: Path) -> None:
    assert launcher(tmp_path, row("RUNNING", id="8")).job() is None


def test_a_part_of_a_job_of_several_parts_is_ours(tmp_path: Path) -> None:
    found = launcher(tmp_path, row("RUNNING", id="7+1"), row("RUNNING", id="7+0")).job()
    assert found is not None


def test_a_silent_controller_does_not_end_a_job(tmp_path: Path) -> None:
    silent = launcher(tmp_path, failing=[SlurmUnreachable("no answer")])
    assert not silent.over()
    seen = job_view(state(), RunDir(tmp_path), silent)
    assert seen.phase == "ready"
    assert "no answer" in seen.reason


def test_a_job_just_submitted_and_not_listed_yet_has_not_ended(tmp_path: Path) -> None:
    assert not launcher(tmp_path, at=time.time()).over()
    assert launcher(tmp_path, at=time.time() - 3600).over()


def test_many_deployments_cost_one_call(tmp_path: Path) -> None:
    records = [JobRecord(job_id=str(i), name=f"d-{i}", submitted_at=0.0) for i in range(5)]
    client = Answers()
    table = JobTable(client, records)
    for record in records:
        table.row(record)
    assert client.calls == [[f"d-{i}" for i in range(5)]]


def test_a_silent_controller_is_asked_less_and_less_often() -> None:
    now = 0.0
    client = Answers(failing=[SlurmUnreachable("no answer")])
    table = JobTable(client, [RECORD], clock=lambda: now)
    asked = []
    for _ in range(400):
        with pytest.raises(SlurmUnreachable):
            table.row(RECORD)
        asked.append(len(client.calls))
        now += 0.1
    assert asked[-1] < 15


def test_a_pending_job_has_processes_that_wait_and_says_why(tmp_path: Path) -> None:
    waits = launcher(tmp_path, row("PENDING", reason="Priority", start="2026-11-28T08:00:00"))
    seen = job_view(state(phase="starting", ready_once=False), RunDir(tmp_path), waits)
    assert seen.phase == "pending"
    assert [(p.state, p.pid) for p in seen.processes] == [("waiting", 0)]
    assert "Priority (other jobs come first)" in seen.reason
    assert job_facts(waits)["line"] == (
        "job 7 is pending in partition gpu: Priority (other jobs come first), place 3 of 9, "
        "estimated start 2026-11-28T08:00:00"
    )


def test_reasons_with_details_are_explained_too() -> None:
    told = pending_text(row("PENDING", reason="ReqNodeNotAvail, UnavailableNodes:n4"), None)
    assert "UnavailableNodes:n4 (a node it asks for is down" in told


def test_a_job_that_runs_is_as_its_controller_wrote(tmp_path: Path) -> None:
    seen = job_view(state(), RunDir(tmp_path), launcher(tmp_path, row("RUNNING")))
    assert seen.phase == "ready"
    assert seen.controller_pid == 4
    assert seen.processes[0].ready


def test_a_job_that_has_begun_without_a_controller_yet_is_starting(tmp_path: Path) -> None:
    begun = state(phase="starting", ready_once=False, controller=ControllerRecord())
    seen = job_view(begun, RunDir(tmp_path), launcher(tmp_path, row("RUNNING", nodes="n[1-2]")))
    assert (seen.phase, seen.reason) == (
        "starting",
        "job 7 has started on n[1-2], its controller is starting",
    )


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("CANCELLED", "job 7 on n1 was cancelled"),
        ("TIMEOUT", "job 7 on n1 was ended at its time limit; slurm.time asks for more"),
        ("NODE_FAIL", "job 7 on n1 lost a node"),
    ],
)
def test_a_job_that_was_ended_from_outside_says_how(tmp_path: Path, word: str, told: str) -> None:
    seen = job_view(state(), RunDir(tmp_path), launcher(tmp_path, row(word, nodes="n1")))
    assert (seen.phase, seen.reason) == ("stopped", told)
    assert not seen.processes[0].pid


def test_nothing_goes_on_changing_once_the_job_has_ended(tmp_path: Path) -> None:
    grows = state(changing="decode-1 awaits a node")
    assert job_view(grows, RunDir(tmp_path), launcher(tmp_path, row("RUNNING"))).changing != ""
    assert job_view(grows, RunDir(tmp_path), launcher(tmp_path, row("CANCELLED"))).changing == ""


def test_a_job_that_failed_before_it_was_ready_says_why(tmp_path: Path) -> None:
    LastWords(id="controller", incarnation=1, kind="placement", message="no room").save(tmp_path)
    before = state(phase="starting", ready_once=False, controller=ControllerRecord())
    seen = job_view(before, RunDir(tmp_path), launcher(tmp_path, row("FAILED", reason="NonZeroExitCode")))
    assert (seen.phase, seen.reason) == ("failed", "job 7 has failed (NonZeroExitCode): no room")


def test_a_forgotten_job_has_ended() -> None:
    assert ended_text(None, "7") == "job 7 has ended, and Slurm has forgotten it"


def test_a_job_that_can_never_start_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(SlurmRejected, match="PartitionTimeLimit"):
        refuse_hopeless(launcher(tmp_path, row("PENDING", reason="PartitionTimeLimit")))


def test_a_job_for_which_the_partition_is_too_small_is_waited_for_a_moment_only(tmp_path: Path) -> None:
    told = launcher(tmp_path, row("PENDING", reason="PartitionConfig"))
    refuse_hopeless(told, 0.5)
    with pytest.raises(SlurmRejected, match="does not have what it asks for"):
        refuse_hopeless(told, 6.0)
    refuse_hopeless(launcher(tmp_path, row("PENDING", reason="Resources")))


def test_the_record_is_read_again_until_the_job_has_an_id(tmp_path: Path) -> None:
    JobRecord(job_id="", name="demo-1", submitted_at=0.0).save(tmp_path)
    early = load_record(tmp_path)
    assert early is not None
    seen = JobLauncher(JobTable(Answers(rows=[row("RUNNING")]), []), early, tmp_path)
    assert seen.record.job_id == ""
    RECORD.save(tmp_path)
    assert seen.record.job_id == "7"


def test_a_run_without_a_record_is_not_on_slurm(tmp_path: Path) -> None:
    assert load_record(tmp_path) is None


def test_a_job_that_slurm_forgot_ended_as_its_controller_wrote(tmp_path: Path) -> None:
    ended = state(phase="failed", reason="decode-0 gave up", ready_once=False)
    seen = job_view(ended, RunDir(tmp_path), launcher(tmp_path))
    assert (seen.phase, seen.reason) == ("failed", "decode-0 gave up")


def test_what_lives_on_in_a_job_that_gave_a_node_is_not_shown_as_stopped(tmp_path: Path) -> None:
    more = JobRecord(job_id="8", name="demo-1.follow-1", submitted_at=0.0)
    save_follow_ups(tmp_path, [FollowUp(job=more, wanted=1, nodes=("n2",))])
    own, there = (
        state().seats[0],
        msgspec.structs.replace(state().seats[0], id="decode-1", index=1, node="n2"),
    )
    ended, runs = row("FAILED", nodes="n1"), row("RUNNING", id="8", name=more.name, nodes="n2")
    seen = job_view(state(seats=[own, there]), RunDir(tmp_path), launcher(tmp_path, ended, runs))
    assert [(one.state, one.pid, one.ready) for one in seen.processes] == [
        ("stopped", 0, False),
        ("stopping", 5, False),
    ]
    assert seen.phase == "stopped"
    assert seen.reason == (
        "job 7 on n1 has failed; job 8 on n2 is about to end, dynctl down demo ends it now"
    )
    seen = job_view(state(seats=[own, there]), RunDir(tmp_path), launcher(tmp_path, ended))
    assert {one.state for one in seen.processes} == {"stopped"}
    assert seen.reason == "job 7 on n1 has failed"
