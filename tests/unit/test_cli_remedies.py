"""What is told to do about a deployment that nobody looks after: a command that works where it is read."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dynctl.cli import changes, remedies
from dynctl.cli.pick import ENV_NAME
from dynctl.deploy.home import RunDir
from dynctl.deploy.status import Diagnosis, diagnose
from dynctl.errors import UsageError
from dynctl.launchers.slurm_job import JobLauncher
from tests.unit.test_cli_changes import view
from tests.unit.test_cli_views import process
from tests.unit.test_slurm_job import launcher, row, state

DEAD = diagnose(view("degraded"), {})
SILENT = Diagnosis("controller", "the controller does not answer: no answer", "controller")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run on this machine, unless a test says otherwise."""
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    monkeypatch.delenv(ENV_NAME, raising=False)
    monkeypatch.setattr(remedies, "state", lambda run: state(head="n1"))
    return RunDir(tmp_path / "runs" / "demo-1")


def test_a_dead_controller_is_followed_by_one_of_up_with_the_recipe_that_is_kept_here(run: RunDir) -> None:
    assert DEAD.layer == "controller"
    told = remedies.remedy(run, view("degraded"), DEAD)
    assert f"up {run.lock} starts a new one" in told


def test_on_another_machine_up_is_called_where_it_was_started(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_NAME, "d")
    told = remedies.remedy(run, view("degraded"), DEAD)
    assert "up with the same recipe and inventory, from where it was started, starts a new one" in told
    assert str(run.path) not in told, "it is a path of the head"
    node = Diagnosis("node", "n3: its agent does not answer (4 s)")
    assert "starts its agent anew" in remedies.remedy(run, view("ready", pid=5), node)
    lost = msgspec.structs.replace(
        view("degraded", pid=5),
        processes=[process("decode-0", "lost"), process("frontend-0")],
        unseen={"n": "its agent does not answer (4 s)"},
    )
    assert "starts its agent anew" in remedies.remedy(run, lost, diagnose(lost, {}))
    ill = msgspec.structs.replace(lost, unseen={})
    assert remedies.remedy(run, ill, diagnose(ill, {})) == "", "that is something else"


def test_a_verb_that_needs_the_controller_tells_the_same(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "pick", lambda name: run)
    monkeypatch.setattr(changes, "ask", lambda run: (view("degraded"), ""))
    with pytest.raises(UsageError) as raised:
        changes.running("d")
    assert raised.value.hint == remedies.new_controller(run)


def test_a_controller_that_hangs_is_ended_first(run: RunDir) -> None:
    told = remedies.remedy(run, view("ready", pid=5), SILENT)
    assert told.startswith("kill -9 5 on n1, then ")


def test_in_a_job_the_keeper_starts_another_one_and_without_a_job_there_is_none(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job: JobLauncher = launcher(tmp_path, row("RUNNING"))
    monkeypatch.setattr(remedies, "launcher_of", lambda run: job)
    told = remedies.remedy(run, view("ready", pid=5), SILENT)
    assert (
        told
        == "srun --jobid=7 --overlap --nodes=1 --ntasks=1 --nodelist=n1 kill -9 5: another one takes over"
    )
    told = remedies.remedy(run, view("degraded"), DEAD)
    assert "down demo ends what is left of it" in told


def test_nothing_is_told_of_what_is_well_or_over(run: RunDir) -> None:
    assert remedies.remedy(run, view("ready", pid=5), Diagnosis()) == ""
    assert remedies.remedy(run, view("stopped"), diagnose(view("stopped"), {})) == ""
    assert remedies.remedy(run, view("starting"), diagnose(view("starting"), {})) == ""
