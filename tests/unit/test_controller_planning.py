"""What the planner makes of seats, of a journal left by a controller before, and what it tells."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from dynctl.controller import amending, planning
from dynctl.controller.planning import PlanDesk, Planning, figures_of, seats_of
from dynctl.deploy.figures import Look
from dynctl.deploy.home import RunDir
from dynctl.deploy.replan import Difference
from dynctl.deploy.run import Site
from dynctl.errors import PlacementError
from dynctl.frontend.gauges import show_planner
from dynctl.observability.metrics import Metrics
from dynctl.planner.core import Ahead, Decision, RoleDecision
from dynctl.planner.journal import Entry, append, read
from dynctl.planner.memory import Interval
from dynctl.planner.observe import Observation, RoleLoad
from dynctl.protocol.day2 import Actor
from dynctl.protocol.planner import PlannerFigures
from tests.unit.planner_rig import config
from tests.unit.supervise_bench import run_state, seat

_SLEEP = asyncio.sleep
_ROUNDS = [0]
"""How often it has looked, or found that there is nothing to look at."""

RECIPE = """
schema: dynctl/v1
name: demo
model: {path: "builtin:tiny"}
backend: mocker
roles: {aggregated: {replicas: 1}}
sla: {ttft: 1s}
planner: {load_interval: 1s, interval: 1s, roles: {aggregated: {min_replicas: 2}}}
"""


def test_replicas_are_counted_by_what_they_are_about_to_be() -> None:
    seats = [
        seat("decode-0", state="ready", ever_ready=True),
        seat("decode-1", state="starting", pid=1),
        seat("decode-2"),
        seat("decode-3", state="ready", asked="leave", ever_ready=True),
        seat("decode-4", state="backoff", ever_ready=True),
        seat("decode-5", state="failed"),
        seat("decode-6", state="failed", ever_ready=True),
        seat("decode-7", state="drained", asked="drain", ever_ready=True),
        seat("decode-8", state="starting", surge=True),
    ]
    state = run_state(*seats)
    state.roles = {"decode": 8}
    found = seats_of(state, config(roles={"decode": config().roles["decode"]}))["decode"]
    assert found.load == RoleLoad(wanted=8, ready=1, starting=2, draining=1, failed=1)
    assert found.ready == ("decode-0",)


def decision(code: str = "up") -> Decision:
    return Decision(
        at=1.0,
        roles={"decode": RoleDecision(current=1, target=2, code=code, why="demand takes 2", floor=2)},
        ahead=Ahead(rate=4.0, isl=100.0, osl=10.0, hit_rate=0.0, horizon_s=60.0, now=3.0),
    )


SEEN = Observation(span_s=5.0, arrivals=10, roles={"decode": RoleLoad(wanted=1, ready=1)})


def test_frontends_show_what_the_planner_told() -> None:
    metrics = Metrics()
    counts: Counter[tuple[str, str]] = Counter({("decode", "up"): 3})
    show_planner(metrics, figures_of(decision(), SEEN, counts))
    text = metrics.render().decode()
    assert 'dynctl_planner_target_replicas{role="decode"} 2.0' in text
    assert 'dynctl_planner_floor_replicas{role="decode"} 2.0' in text
    assert "dynctl_planner_observed_requests_per_second 2.0" in text
    assert "dynctl_planner_predicted_requests_per_second 4.0" in text
    assert 'dynctl_planner_decisions_total{decision="up",role="decode"} 3.0' in text


def test_metrics_of_a_later_release_are_left_out() -> None:
    metrics = Metrics()
    show_planner(metrics, PlannerFigures(gauges={"planner_mood": {"": 1.0}}))
    assert "mood" not in metrics.render().decode()


class Desk:
    """A run directory with a recipe, a state, and what was noted and told."""

    def __init__(self, folder: Path, text: str = RECIPE) -> None:
        self.run = RunDir(folder)
        self.run.lock.write_text(text)
        self.state = run_state(
            seat("frontend-0", "frontend", state="ready", pid=1, url="http://127.0.0.1:1"),
            seat("aggregated-0", state="ready", pid=2, ever_ready=True),
        )
        self.state.roles, self.state.phase = {"aggregated": 1}, "ready"
        self.noted: list[tuple[str, dict[str, str | int | float]]] = []
        self.told: list[PlannerFigures] = []
        self.planning = Planning(
            PlanDesk(
                self.run, self.state, lambda name, fields: self.noted.append((name, fields)), self.told.append
            )
        )


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frontends that answer; no hosts to read; a clock that is not slept for."""
    monkeypatch.setattr(
        planning, "look", lambda doors: Look(time.monotonic(), {one: {("x", ()): 1.0} for one in doors})
    )
    monkeypatch.setattr(planning, "read_plan", lambda run: None)
    monkeypatch.setattr(planning, "hosts_of", lambda run, plan: type("Hosts", (), {"hosts": ()}))

    async def sleep(seconds: float) -> None:
        _ROUNDS[0] += 1
        await _SLEEP(0.01)

    monkeypatch.setattr(asyncio, "sleep", sleep)


@pytest.mark.usefixtures("looks")
async def test_what_is_decided_is_done_and_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[dict[str, int]] = []
    desk = Desk(tmp_path)

    def scale(run: RunDir, changes: dict[str, int]) -> None:
        done.append(dict(changes))
        desk.state.roles = {"aggregated": 2}

    monkeypatch.setattr(planning, "scale", scale)
    await _run(desk)
    assert done == [{"aggregated": 2}]
    entries = read(desk.run.planner)
    assert [entry.outcome for entry in entries if entry.decision.changed] == ["done"]
    assert ("planner.scaled", "aggregated=2") in [(name, str(f.get("to"))) for name, f in desk.noted]
    assert "aggregated 1 -> 2" in desk.state.planner
    assert desk.told


@pytest.mark.usefixtures("looks")
async def test_growth_that_was_given_up_meanwhile_counts_as_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []
    desk = Desk(tmp_path)

    def scale(run: RunDir, changes: dict[str, int]) -> None:
        tries.append(1)
        desk.state.declined, desk.state.declined_at = "aggregated=2: no node was given", 5.0

    monkeypatch.setattr(planning, "scale", scale)
    await _run(desk)
    assert len(tries) == 1
    assert "refused: aggregated=2: no node was given" in [entry.outcome for entry in read(desk.run.planner)]


@pytest.mark.usefixtures("looks")
async def test_advice_is_an_event_once_and_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "scale", None)
    desk = Desk(tmp_path, RECIPE.replace("planner: {", "planner: {advisory: true, "))
    await _run(desk)
    assert [(name, fields["to"]) for name, fields in desk.noted] == [("planner.advised", "aggregated=2")]
    assert "advice of" in desk.state.planner
    assert "aggregated 1 -> 2" in desk.state.planner
    counted = [told.decisions for told in desk.told]
    assert counted[-1] == [("aggregated", "up", 1)]


@pytest.mark.usefixtures("looks")
async def test_what_is_refused_is_told_and_not_tried_in_a_tight_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def scale(run: RunDir, changes: dict[str, int]) -> None:
        tries.append(1)
        raise PlacementError("there is no free GPU")

    monkeypatch.setattr(planning, "scale", scale)
    desk = Desk(tmp_path)
    await _run(desk)
    assert len(tries) == 1
    assert "refused: there is no free GPU" in desk.state.planner
    assert [name for name, _ in desk.noted] == ["planner.refused"]


@pytest.mark.usefixtures("looks")
async def test_a_look_that_breaks_does_not_end_the_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, broke = Desk(tmp_path), []

    def breaks(*args: object) -> Decision:
        broke.append(1)
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(planning, "decide", breaks)
    await _run(desk)
    assert len(broke) > 1
    assert "its last look failed: ZeroDivisionError" in desk.state.planner


@pytest.mark.usefixtures("looks")
async def test_frontends_that_do_not_answer_are_not_taken_for_no_demand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "look", lambda doors: Look(time.monotonic(), {}))
    desk = Desk(tmp_path)
    await _run(desk)
    assert desk.state.planner == "no frontend tells its figures"
    assert read(desk.run.planner) == []


@pytest.mark.usefixtures("looks")
async def test_a_recipe_that_cannot_be_used_turns_it_off_and_a_better_one_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "scale", lambda run, changes: None)
    desk = Desk(tmp_path, RECIPE.replace("sla: {ttft: 1s}", ""))
    await _run(desk)
    assert desk.state.planner.startswith("off: ")
    assert "no service level" in desk.state.planner
    desk.run.lock.write_text(RECIPE)
    await _run(desk)
    assert "aggregated" in desk.state.planner
    desk.run.lock.write_text(RECIPE.split("planner:")[0])
    await _run(desk)
    assert desk.state.planner == ""


@pytest.mark.usefixtures("looks")
async def test_a_full_disk_keeps_it_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, entry: Entry) -> None:
        raise OSError(28, "No space left on device")

    done: list[int] = []
    monkeypatch.setattr(planning, "append", full)
    monkeypatch.setattr(planning, "scale", lambda run, changes: done.append(1))
    await _run(Desk(tmp_path))
    assert done


def test_demand_of_before_a_restart_is_remembered_unless_it_is_old(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    entry = Entry(
        ts=time.time(), decision=decision(), observation=SEEN, interval=Interval(1.0, 2.0, 3.0), boot_s=42.0
    )
    append(run.planner, entry)
    rules = config(season_s=60.0)
    kept = planning._remembered(run, rules)
    assert (list(kept.past), kept.boot_s) == ([Interval(1.0, 2.0, 3.0)], 42.0)
    run.planner.unlink()
    append(run.planner, Entry(ts=time.time() - 86_400.0, decision=decision(), observation=SEEN))
    assert not planning._remembered(run, rules).past
    run.planner.unlink()
    run.planner.mkdir()
    assert not planning._remembered(run, rules).past


def test_scaling_is_what_the_verb_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def rescaled(run: RunDir, roles: dict[str, int], site: Site) -> SimpleNamespace:
        return SimpleNamespace(old=roles, new=site.home.root)

    def apply(amended: SimpleNamespace, who: Actor, roles: tuple[str, ...]) -> None:
        asked.append((amended.old, amended.new, who.verb, who.args))

    monkeypatch.setattr(amending, "rescaled", rescaled)
    monkeypatch.setattr(amending, "apply", apply)
    turned = Difference(taken={"decode-2": "prefill-3"})
    monkeypatch.setattr(amending, "compare", lambda old, new: turned)
    run = RunDir(tmp_path / "home" / "runs" / "r")
    assert amending.scale(run, {"decode": 3}) == ["prefill-3 becomes decode-2, its engine runs on"]
    assert asked == [({"decode": 3}, tmp_path / "home", "planner", ["decode=3"])]


@pytest.mark.usefixtures("looks")
async def test_the_journal_says_which_worker_changes_its_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "scale", lambda run, changes: ["a-1 becomes b-1, its engine runs on"])
    desk = Desk(tmp_path)
    await _run(desk)
    outcomes = [entry.outcome for entry in read(desk.run.planner)]
    assert outcomes[0] == "done: a-1 becomes b-1, its engine runs on"
    assert "done: a-1 becomes b-1" in desk.state.planner


@pytest.mark.usefixtures("looks")
async def test_without_a_recipe_or_before_it_is_ready_nothing_is_looked_at(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.state.phase = "starting"
    await _run(desk)
    desk.run.lock.unlink()
    await _run(desk)
    assert desk.told == []
    assert desk.state.planner.startswith("off: ")


async def _run(desk: Desk) -> None:
    """Let it look some times."""
    ends, task = _ROUNDS[0] + 8, asyncio.create_task(desk.planning.run())
    async with asyncio.timeout(30.0):
        while _ROUNDS[0] < ends:
            await _SLEEP(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
