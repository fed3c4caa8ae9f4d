"""Which deployment is meant, and whether it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynctl.cli.pick import ENV_NAME, ENV_RUN_ID, Elsewhere, _tables, home, pick, running_names, view
from dynctl.deploy.home import Home, RunDir, is_trial, trial_name
from dynctl.deploy.remote_note import Remote, RemoteHost, save_remote
from dynctl.deploy.state import ControllerRecord, RunState, encode_state
from dynctl.errors import UsageError
from dynctl.launchers.base import ENV_PROCESS, ENV_RUN
from dynctl.launchers.slurm_client import JobRow, SlurmClient
from dynctl.launchers.slurm_follow import FollowUp, save_follow_ups
from dynctl.launchers.slurm_job import JobRecord
from dynctl.topology.inventory import Ssh

RUN_ID = f"young-{os.getpid()}"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that has just been written: nothing of it has written itself down."""
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    place = Home(tmp_path)
    place.prepare()
    state = RunState(
        name="young",
        run_id=RUN_ID,
        url="http://127.0.0.1:1",
        registry="tcp://127.0.0.1:2",
        backend="mocker",
        model="tiny",
        roles={"aggregated": 1},
        created_at=0.0,
        seats=[],
        controller=ControllerRecord(incarnation=1),
        phase="starting",
    )
    made = place.create_run(RUN_ID, {"state.json": encode_state(state).decode()})
    place.point("young", made)
    return made


@pytest.fixture
def controller(run: RunDir) -> Iterator[int]:
    """A process that is the controller of the run as far as anybody can see."""
    env = {**os.environ, ENV_RUN: run.run_id, ENV_PROCESS: "controller"}
    program = "import sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child.pid
        child.kill()


def test_a_controller_that_has_not_written_itself_down_runs(run: RunDir, controller: int) -> None:
    seen = view(run)
    assert (seen.phase, seen.controller_pid) == ("starting", controller)
    assert running_names() == ["young"]
    assert pick(None) == run


def test_a_run_whose_controller_never_came_has_ended(run: RunDir) -> None:
    assert view(run).phase == "stopped"
    assert running_names() == []
    with pytest.raises(UsageError, match="no deployment runs"):
        pick(None)


def test_on_a_home_shared_with_the_head_a_name_means_the_note_and_for_the_head_the_run(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = RemoteHost(name="n1", python="python3", home=str(tmp_path), ssh=Ssh("n1"))
    save_remote(
        Home(tmp_path).make_note("young"), Remote(name="young", run_id=RUN_ID, hosts=[host], recipe="")
    )
    with pytest.raises(Elsewhere):
        pick("young")
    assert running_names() == ["young"]
    monkeypatch.setenv(ENV_NAME, "young")
    assert pick(None, ended=True).path.resolve() == run.path.resolve()


def test_a_verb_for_a_run_that_was_replaced_meanwhile_is_refused(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_NAME, "young")
    monkeypatch.setenv(ENV_RUN_ID, "young-before")
    for name in ("young", None):
        with pytest.raises(UsageError, match=f"another run by now: {RUN_ID} took the place of young-before"):
            pick(name, ended=True)
    monkeypatch.setenv(ENV_RUN_ID, RUN_ID)
    assert pick(None, ended=True) == run


@pytest.mark.usefixtures("controller")
def test_what_a_profile_measures_is_nobodys_default(run: RunDir) -> None:
    place = home()
    trial = trial_name("0123abcd", "tp1")
    place.point(trial, place.create_run("trial-1", {"state.json": run.state.read_text()}))
    assert pick(None).run_id == run.run_id
    assert pick(None, ended=True).run_id == run.run_id
    assert pick(trial).run_id == "trial-1"
    place.point("profile-chat", place.create_run("mine-1", {"state.json": run.state.read_text()}))
    assert not is_trial("profile-chat")


def test_of_a_deployment_that_is_forgotten_nothing_is_left(run: RunDir) -> None:
    place = home()
    place.forget("young")
    assert (place.names(), list(place.runs.iterdir())) == ([], [])
    place.forget("young")


def test_a_run_whose_own_job_ended_runs_while_one_that_gave_it_nodes_does(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, more = (JobRecord(job_id=n, name=f"young.{n}", submitted_at=0.0) for n in ("7", "8"))
    own.save(run.path)
    save_follow_ups(run.path, [FollowUp(job=more, wanted=1, nodes=("n2",))])
    ended = JobRow(id="7", name=own.name, state="FAILED")
    rows = [ended, JobRow(id="8", name=more.name, state="RUNNING")]
    monkeypatch.setattr(SlurmClient, "jobs", lambda self, names: rows)
    assert running_names() == ["young"]
    assert pick(None) == run
    rows[1:] = []
    _tables.clear()
    assert running_names() == []
