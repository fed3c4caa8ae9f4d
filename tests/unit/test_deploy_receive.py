"""What a host does for a deployment that another machine ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dynctl.deploy.home import Home
from dynctl.deploy.receive import Sweep, answer
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


def test_a_run_that_is_not_to_be_kept_is_removed_and_another_of_its_name_is_not(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.prepare()
    other, gone = f"other-{RUN_ID}", f"gone-{RUN_ID}"
    home.point("one", home.create_run(gone, {"plan.json": "{}"}))
    home.create_node(gone, "n2", {"plan.json": "{}"})
    home.create_run(other, {"plan.json": "{}"})
    answer(Sweep(run_id=gone, drain_s=0.0, forget="one"), home, LocalLauncher())
    assert [path.name for path in home.runs.iterdir()] == [other]
    assert not list((home.root / "nodes").iterdir())
    assert home.names() == []
    home.point("one", home.create_run(gone, {"plan.json": "{}"}))
    answer(Sweep(run_id=other, drain_s=0.0, forget="one"), home, LocalLauncher())
    assert [path.name for path in home.runs.iterdir()] == [gone]
    assert home.names() == ["one"], "it means another run"
