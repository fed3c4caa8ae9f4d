"""What day-2 verbs make of their words, and when waiting is over."""

from __future__ import annotations

import pytest

from dynctl.cli.drain import meant
from dynctl.cli.restart import chosen
from dynctl.cli.scale import counts
from dynctl.cli.wait import raise_hopeless, reached
from dynctl.deploy.audit import actor, shown
from dynctl.deploy.status import diagnose
from dynctl.errors import ProcessExited, UsageError
from dynctl.protocol.deployment import DeploymentView, Phase, SeatState
from tests.unit.test_deploy_figures import row

NODE = "a-node-with-quite-a-long-name.example"


def view(phase: Phase = "ready", changing: str = "", **states: SeatState) -> DeploymentView:
    rows = [row(seat.replace("_", "-"), state) for seat, state in states.items()]
    return DeploymentView(
        name="d",
        run_id="r",
        run_dir="/d",
        url="http://h",
        phase=phase,
        reason="",
        controller_pid=1,
        wanted={"decode": 2},
        processes=rows,
        changing=changing,
    )


WELL = view(frontend_0="ready", decode_0="ready", decode_1="ready")


@pytest.mark.parametrize(
    ("goal", "seen", "done"),
    [
        ("ready", WELL, True),
        ("settled", WELL, True),
        ("degraded", WELL, False),
        ("down", WELL, False),
        ("ready", view(changing="x", decode_0="ready"), True),
        ("settled", view(changing="x", decode_0="ready"), False),
        ("ready", view("degraded", decode_0="backoff"), False),
        ("degraded", view("degraded", decode_0="backoff"), True),
        ("down", view("stopped", decode_0="stopped"), True),
    ],
)
def test_waiting_is_over_when_it_is_so_and_not_before(goal: str, seen: DeploymentView, done: bool) -> None:
    assert reached(goal, seen, diagnose(seen, {})) is done


def test_nobody_waits_for_what_will_never_be() -> None:
    for goal, seen in (
        ("ready", view("failed", decode_0="failed")),
        ("ready", view("degraded", decode_0="failed")),
        ("settled", view("stopped", decode_0="stopped")),
        ("degraded", view("stopped", decode_0="stopped")),
    ):
        with pytest.raises(ProcessExited):
            raise_hopeless(goal, seen, diagnose(seen, {}))
    raise_hopeless("down", view("degraded", decode_0="failed"), diagnose(WELL, {}))
    raise_hopeless("degraded", view("ready", decode_0="failed"), diagnose(WELL, {}))


def test_replicas_are_meant_by_role_number_or_node() -> None:
    assert [r.id for r in chosen(WELL, ["decode"])] == ["decode-0", "decode-1"]
    assert [r.id for r in chosen(WELL, ["decode/1", "decode-1", "frontend"])] == ["decode-1", "frontend-0"]
    assert [r.id for r in meant(WELL, [NODE])] == ["frontend-0", "decode-0", "decode-1"]
    with pytest.raises(UsageError, match="no process 'decode/7'") as refused:
        chosen(WELL, ["decode/7"])
    assert "decode-1" in refused.value.hint


def test_scale_takes_numbers_and_says_what_is_none() -> None:
    assert counts(["decode=3", "prefill=0"]) == {"decode": 3, "prefill": 0}
    for word in ("decode", "decode=", "decode=-1", "decode=x", "=3"):
        with pytest.raises(UsageError, match="ROLE=N"):
            counts([word])


def test_the_audit_holds_no_secret() -> None:
    told = shown(
        ["r.yaml", "frontend.api_key=very-secret", "engine.env.HF_TOKEN=x", "roles.decode.replicas=2"]
    )
    assert told == ["r.yaml", "frontend.api_key=***", "engine.env.HF_TOKEN=***", "roles.decode.replicas=2"]
    assert actor("down", force=True).args == ["--force"]
