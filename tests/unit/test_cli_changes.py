"""Verbs that change a deployment while they wait for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.cli import changes
from dynctl.cli.pick import ENV_NAME
from dynctl.deploy.home import RunDir
from dynctl.errors import ProcessExited, UsageError
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


@pytest.mark.parametrize(("elsewhere", "told"), [(True, "up with the same"), (False, "recipe.lock.yaml")])
def test_the_remedy_for_a_dead_controller_works_where_it_is_read(
    elsewhere: bool, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENV_NAME, raising=False)
    if elsewhere:
        monkeypatch.setenv(ENV_NAME, "d")
    monkeypatch.setattr(changes, "pick", lambda name: RUN)
    monkeypatch.setattr(changes, "ask", lambda run: (view("degraded"), ""))
    with pytest.raises(UsageError) as raised:
        changes.running("d")
    assert told in raised.value.hint
