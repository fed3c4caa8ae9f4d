"""What a host does for a deployment that another machine ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dynctl.deploy.home import Home
from dynctl.deploy.receive import Claim, Join, Spawn, Sweep, answer
from dynctl.deploy.state import LockRecord, RunState, encode_state
from dynctl.errors import UsageError
from dynctl.launchers.local import LocalLauncher

RUN_ID = f"locked-{os.getpid()}"


def test_a_locked_run_is_swept_only_by_force(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    state = RunState(
        name="locked",
        run_id=RUN_ID,
        url="http://127.0.0.1:1",
        registry="tcp://127.0.0.1:2",
        backend="mocker",
        model="tiny",
        roles={"aggregated": 1},
        created_at=0.0,
        seats=[],
        phase="ready",
        locked=LockRecord(message="demo", user="anna", host="laptop", at=0.0),
    )
    home.create_run(RUN_ID, {"state.json": encode_state(state).decode()})
    with pytest.raises(UsageError, match=r"'locked' is locked by .*anna"):
        answer(Sweep(run_id=RUN_ID, drain_s=0.0), home, LocalLauncher())
    assert answer(Sweep(run_id=RUN_ID, drain_s=0.0, force=True), home, LocalLauncher()).ended == 0


def test_a_call_that_never_comes_is_not_waited_for_for_ever() -> None:
    """The host does not learn of a link that was cut: nothing may be left there of an `up` behind it."""
    program = "import dynctl.deploy.receive as one; one.CALLED_S = 1; one.main()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as waits:
        assert waits.wait(30.0) == -signal.SIGALRM


def test_a_call_that_comes_after_its_run_was_ended_starts_nothing(tmp_path: Path) -> None:
    """It was on its way over a link that was cut, and is delivered when that is back."""
    home, launcher = Home(tmp_path / "home"), LocalLauncher()
    run_id = f"late-{os.getpid()}"
    agent = Spawn(process_id="agent-n2", incarnation=1, argv=["sleep", "60"], env={})
    answer(Sweep(run_id=run_id, drain_s=0.0), home, launcher)
    calls: list[Join | Claim] = [
        Join(name="late", run_id=run_id, node="n2", files={}, spawn=[agent]),
        Claim(name="late", run_id=run_id, files={}, spawn=[agent]),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="has been ended meanwhile"):
            answer(call, home, launcher)
    assert launcher.owned(run_id) == []
    assert home.run_of("late") is None


def test_what_runs_is_ended_also_where_nothing_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").write_text("")
    swept = answer(Sweep(run_id=RUN_ID, drain_s=0.0), Home(tmp_path / "home"), LocalLauncher())
    assert swept.ended == 0
    assert "cannot be used" in capsys.readouterr().err
