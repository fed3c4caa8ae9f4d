"""What verbs show: the live view, logs' arguments, chat's stream, health answers."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import termios
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynctl.cli import live, planner
from dynctl.cli.chat import chunks, error_message
from dynctl.cli.live import PlainScreen, stages, view_parts
from dynctl.cli.logs import compiled, last, matching, split_words
from dynctl.cli.render import columns_of, counted, cut
from dynctl.cli.status import doubts_of
from dynctl.deploy.ask import Health, health_doubts, health_reason
from dynctl.deploy.home import RunDir
from dynctl.deploy.logs import Line
from dynctl.errors import EngineFailed, UsageError
from dynctl.launchers.base import ProcessHandle
from dynctl.planner.core import Ahead, Decision, RoleDecision
from dynctl.planner.journal import Entry
from dynctl.planner.observe import Observation, RoleLoad, WorkerLoad
from dynctl.protocol.deployment import DeploymentView, Phase, ProcessView, SeatState


def process(seat: str, state: SeatState = "ready", restarts: int = 0) -> ProcessView:
    role, _, index = seat.partition("-")
    return ProcessView(
        id=seat,
        role=role,
        index=int(index),
        instance=seat,
        node="n",
        state=state,
        ready=state == "ready",
        pid=7,
        engine_pid=8,
        restarts=restarts,
        url="u",
        incarnation=1,
    )


def deployment(phase: Phase, reason: str, *rows: ProcessView) -> DeploymentView:
    return DeploymentView(
        name="d",
        run_id="r",
        run_dir="/r",
        url="http://h",
        phase=phase,
        reason=reason,
        controller_pid=1,
        wanted={"prefill": 1, "decode": 1},
        processes=list(rows),
    )


STARTING = deployment(
    "starting",
    "decode-0 is starting",
    process("frontend-0"),
    process("prefill-0"),
    process("decode-0", "starting"),
)
DEGRADED = deployment(
    "degraded", "decode-0 will be restarted: x", process("frontend-0"), process("decode-0", "backoff", 2)
)


def text(seen: DeploymentView | None) -> str:
    return "".join(part for part, _ in view_parts(seen, 65))


def test_the_live_view_shows_stages_counts_url_and_processes() -> None:
    assert text(None) == "starting the controller"
    shown = text(STARTING)
    assert "1/1P 0/1D" in shown
    assert "http://h" in shown
    assert "1m05s" in shown
    assert "✓ frontend   · workers   · serving" in shown
    assert "decode-0 is starting" not in shown
    assert "restarts 2" in text(DEGRADED)
    assert text(DEGRADED).endswith("decode-0 will be restarted: x")


def test_stages_follow_one_another() -> None:
    assert [done for _, done in stages(STARTING)] == [True, True, True, True, False, False]


def test_off_a_terminal_only_news_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with PlainScreen() as screen:
        for seen in (STARTING, STARTING, DEGRADED):
            screen.show(seen)
    assert capsys.readouterr().err.splitlines() == [
        "d: starting, ready 1/1P 0/1D",
        "d: degraded, ready 0/1P 0/1D: decode-0 will be restarted: x",
    ]


def test_the_words_of_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    (tmp_path / "deployments").mkdir()
    for name in ("quick", "decode"):
        (tmp_path / "deployments" / name).symlink_to("../runs/x")
    assert split_words([]) == (None, None)
    assert split_words(["quick"]) == ("quick", None)
    assert split_words(["decode/0"]) == (None, "decode/0")
    assert split_words(["decode"]) == ("decode", None)
    assert split_words(["frobnicate"]) == (None, "frobnicate")
    assert split_words(["quick", "decode"]) == ("quick", "decode")
    with pytest.raises(UsageError, match="too many"):
        split_words(["a", "b", "c"])


def test_lines_are_filtered_before_they_are_counted() -> None:
    lines = [Line(0.0, "a", word) for word in ("one", "two", "one more", "three")]
    found = last(matching(lines, compiled("one")), 1)
    assert [line.text for line in found] == ["one more"]
    assert list(last(matching(lines, compiled(None)), None)) == lines


def test_a_stream_is_read_to_its_end() -> None:
    stream = io.BytesIO(b': ping\n\ndata: {"a": 1}\n\ndata: [DONE]\n\ndata: {"b": 2}\n')
    assert list(chunks(stream, "u")) == [{"a": 1}]


@pytest.mark.parametrize(
    ("raw", "said"),
    [(b'data: {"a": 1}\n\n', "broke off"), (b'data: {"error": {"message": "no blocks"}}\n\n', "no blocks")],
)
def test_a_stream_that_breaks_is_an_error(raw: bytes, said: str) -> None:
    with pytest.raises(EngineFailed, match=said):
        list(chunks(io.BytesIO(raw), "u"))


@pytest.mark.parametrize(
    ("body", "said"),
    [(b'{"error": {"message": "x"}}', "x"), (b'{"error": "y"}', "y"), (b"<html>", "status 502: <html>")],
)
def test_error_bodies_of_any_shape(body: bytes, said: str) -> None:
    assert error_message(body, 502) == said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"reason": "no worker"}', "no worker"),
        (b'{"reasons": ["a", "b"]}', "a; b"),
        (b'{"error": {"message": "draining"}}', "draining"),
        (b"[]", "/health answers 503"),
        (b"", "/health answers 503"),
    ],
)
def test_health_answers_of_any_shape(body: bytes, said: str) -> None:
    assert health_reason(body, 503) == said


@pytest.mark.parametrize("body", [b"", b"[]", b'{"doubts": 1}', b"{}"])
def test_answers_without_doubts_have_none(body: bytes) -> None:
    assert health_doubts(body) == ()


def test_doubts_are_told_once_with_whose_they_are() -> None:
    assert health_doubts(b'{"doubts": ["a", "b"]}') == ("a", "b")
    health = {"frontend-0": Health("", ("a",)), "frontend-1": Health("bad", ("a", "b"))}
    assert doubts_of(health) == ["a (frontend-0, frontend-1)", "b (frontend-1)"]


def test_a_decision_is_told_with_its_reason_and_the_figures_behind_it() -> None:
    role = RoleDecision(current=1, target=2, code="up", why="demand takes 2", floor=2)
    told = "\n".join(
        planner.shown(
            Entry(
                ts=0.0,
                decision=Decision(
                    at=1.0,
                    roles={"decode": role},
                    ahead=Ahead(rate=4.0, isl=100.0, osl=10.0, hit_rate=0.25, horizon_s=60.0, now=3.0),
                ),
                observation=Observation(
                    span_s=5.0,
                    arrivals=10,
                    queued=3,
                    ttft_s=0.25,
                    itl_s=0.0123,
                    roles={
                        "decode": RoleLoad(
                            wanted=1, ready=1, workers=(WorkerLoad(id="d", running=4.0, kv_usage=0.5),)
                        )
                    },
                ),
                outcome="done",
            )
        )
    )
    for part in (
        "decode 1 -> 2",
        "done",
        "demand takes 2 [floor 2] [ready 1 of 1]",
        "10 requests in 5.0 s; 3 waiting; TTFT 250 ms; ITL 12.3 ms;",
        "decode: 4.0 running, 0.0 waiting each, KV 50%",
        "4.00 requests/s at most in 60 s (3.00 now), prompts 100, answers 10 tokens, 25% cached",
    ):
        assert part in told


def test_a_line_longer_than_the_terminal_is_cut_and_off_a_terminal_none_is() -> None:
    assert cut("ready 1/4: aggregated-1 is starting", 20) == "ready 1/4: aggre ..."
    assert len(cut("ready 1/4: aggregated-1 is starting", 20)) == 20
    assert cut("ready", 5) == "ready"
    assert cut("ready 1/4: aggregated-1 is starting", columns_of(io.StringIO())).endswith("starting")
    controller, terminal = os.openpty()
    with os.fdopen(controller, "rb"), os.fdopen(terminal, "w") as shown:
        fcntl.ioctl(shown, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 77, 0, 0))
        assert columns_of(shown) == 77


def test_one_is_no_plural() -> None:
    assert (counted(1, "host"), counted(2, "host"), counted(0, "host")) == ("1 host", "2 hosts", "0 hosts")


def test_who_leaves_before_anything_was_shown_is_told_the_name_and_not_the_runs_id(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live, "changes", interrupted)
    monkeypatch.setattr(live, "state", lambda run: SimpleNamespace(name="quickstart"))
    stopper: Any = SimpleNamespace()
    assert live.follow(RunDir(Path("/runs/quickstart-1")), ProcessHandle(1, 0, 0), stopper) == 0
    assert "dynctl status quickstart --watch comes back" in capsys.readouterr().err
