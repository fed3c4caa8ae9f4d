"""Verbs that change a deployment while they wait for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynctl.cli import changes
from dynctl.deploy.home import RunDir
from dynctl.deploy.room import Room
from dynctl.errors import NodeSilent, ProcessExited
from dynctl.protocol.deployment import DeploymentView, Phase

RUN = RunDir(Path("/nowhere/runs/d-1"))


def view(
    phase: Phase, reason: str = "", pid: int = 0, changing: str = "decode-1 awaits a node"
) -> DeploymentView:
    return DeploymentView(
        name="d",
        run_id="d-1",
        run_dir=str(RUN.path),
        url="",
        phase=phase,
        reason=reason,
        controller_pid=pid,
        wanted={},
        processes=[],
        changing="decode-1 awaits a node",
    )


def test_a_deployment_that_ends_while_it_is_waited_for_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = [view("ready", pid=7), view("stopped", "job 50 on n1 was cancelled")]
    monkeypatch.setattr(changes, "ask", lambda run: (seen.pop(0), "" if seen else "no answer"))
    with pytest.raises(ProcessExited, match="'d' ended meanwhile: job 50 on n1 was cancelled"):
        changes.until_settled(RUN, 60.0)
    assert seen == []


def test_a_change_of_what_is_on_a_node_that_does_not_answer_is_refused_before_anything_is_done() -> None:
    spots = {"decode-0": ["n1"], "decode-1": ["n3"], "decode-2": ["n1", "n3"]}
    processes = [SimpleNamespace(id=seat, spots=[(n, ()) for n in nodes]) for seat, nodes in spots.items()]
    old = SimpleNamespace(name="d", processes=processes)
    amended: Any = SimpleNamespace(old=old, room=Room(lost={"n3": "its agent does not answer"}))
    changes.require_answers(amended, ["decode-0"], "restarted")
    for seat in ("decode-1", "decode-2"):
        with pytest.raises(NodeSilent) as raised:
            changes.require_answers(amended, ["decode-0", seat], "restarted")
        assert str(raised.value) == (
            f"n3: {seat} cannot be restarted now: its agent does not answer"
            " (nothing was changed; dynctl status d tells what helps)"
        )
