"""The way down when no controller helps, and waiting for ready, with made-up processes and time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from dynctl import procfs
from dynctl.deploy import stop
from dynctl.deploy.ask import Health
from dynctl.deploy.claim import Up
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.state import ControllerRecord, RunState, SeatRecord, drain_of, load_state, save_state
from dynctl.deploy.stop import Stopper, stop_run
from dynctl.deploy.watch import Waiter, failure_of, wait_ready
from dynctl.errors import LaunchError, NotReady, PeerLost, PortInUse, ProcessExited
from dynctl.launchers.base import Exit, Launch, Owned, ProcessHandle, RunRef
from dynctl.protocol.deployment import DeploymentView
from dynctl.protocol.exits import LastWords


class Processes:
    """A launcher over processes that exist only here; `deaf` ones ignore SIGTERM, `undead` even SIGKILL."""

    def __init__(self, *ids: str, deaf: Sequence[str] = (), undead: Sequence[str] = ()) -> None:
        self.alive = {n: seat for n, seat in enumerate(ids, start=10)}
        self.deaf, self.undead = deaf, undead
        self.told: list[tuple[str, int]] = []
        self.now = 0.0

    def start(self, launch: Launch, run: RunRef) -> ProcessHandle:
        raise NotImplementedError

    def poll(self, handles: Sequence[ProcessHandle]) -> list[Exit]:
        return [Exit(h, 1) for h in handles if h.pid not in self.alive]

    def signal(self, handle: ProcessHandle, signum: int) -> bool:
        seat = self.alive[handle.pid]
        self.told.append((seat, signum))
        if signum == signal.SIGKILL or seat not in self.deaf:
            del self.alive[handle.pid]
        return True

    def owned(self, run_id: str) -> list[Owned]:
        # Of two processes of one seat the later is the earlier's child.
        first: dict[str, int] = {}
        found = []
        for pid, seat in self.alive.items():
            found.append(Owned(ProcessHandle(pid, 1, pid), first.get(seat, 1), seat, 1))
            first.setdefault(seat, pid)
        return found

    def kill(self, victims: Iterable[Owned]) -> None:
        for victim in victims:
            if victim.process_id not in self.undead:
                self.told.append((victim.process_id, signal.SIGKILL))
                self.alive.pop(victim.handle.pid, None)

    def release(self, handle: ProcessHandle) -> None:
        raise NotImplementedError

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def stopper(self) -> Stopper:
        return Stopper(self, clock=lambda: self.now, sleep=self.sleep)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    home = Home(tmp_path)
    home.prepare()
    return home.create_run("d-1", {})


def some_state(phase: str = "ready", **seat_fields: object) -> RunState:
    seat = SeatRecord(
        id="decode-0",
        kind="worker",
        role="decode",
        index=0,
        node="n",
        start_timeout_s=1.0,
        pid=10,
        **seat_fields,  # type: ignore[arg-type]
    )
    return RunState(
        name="d",
        run_id="d-1",
        url="http://h",
        registry="tcp://127.0.0.1:1",
        backend="b",
        model="m",
        roles={"decode": 1},
        created_at=1.0,
        seats=[seat],
        phase=phase,  # type: ignore[arg-type]
    )


def frontend_seat(index: int) -> SeatRecord:
    seat = f"frontend-{index}"
    return SeatRecord(
        id=seat,
        kind="frontend",
        role="frontend",
        index=index,
        node="n",
        start_timeout_s=1.0,
        url=f"http://h:{index}",
    )


def test_frontends_are_asked_before_workers_and_engines_are_left_to_their_sidecars(run: RunDir) -> None:
    save_state(run.state, some_state())
    processes = Processes("decode-0", "decode-0", "frontend-0")
    assert stop_run(run, processes.stopper(), 5.0) == 3
    assert processes.told == [
        ("frontend-0", signal.SIGTERM),
        ("decode-0", signal.SIGTERM),
        ("decode-0", signal.SIGKILL),
    ]
    state = load_state(run.state)
    assert state is not None
    assert (state.phase, state.seats[0].state, state.seats[0].pid) == ("stopped", "stopped", 0)


def test_what_does_not_end_in_time_is_killed(run: RunDir) -> None:
    processes = Processes("decode-0", deaf=("decode-0",))
    stop_run(run, processes.stopper(), 5.0)
    assert processes.now >= 5.0
    assert processes.told == [("decode-0", signal.SIGTERM), ("decode-0", signal.SIGKILL)]


def test_an_engine_has_the_time_to_exit_that_its_recipe_says(run: RunDir) -> None:
    save_state(run.state, some_state(stop_timeout_s=60.0))
    processes = Processes("decode-0", deaf=("decode-0",))
    stop_run(run, processes.stopper(), 5.0)
    assert processes.now >= 65.0


def test_requests_have_the_time_to_end_that_the_recipe_says() -> None:
    assert drain_of(some_state(drain_timeout_s=300.0)) == 300.0
    assert drain_of(None) == 30.0


def test_with_no_time_to_drain_all_are_killed_at_once(run: RunDir) -> None:
    processes = Processes("decode-0", "frontend-0")
    stop_run(run, processes.stopper(), 0.0)
    assert {signum for _, signum in processes.told} == {signal.SIGKILL}


def test_what_cannot_be_killed_is_named(run: RunDir) -> None:
    processes = Processes("decode-0", deaf=("decode-0",), undead=("decode-0",))
    with pytest.raises(LaunchError, match=r"could not be killed: decode-0 \(pid 10\)"):
        stop_run(run, processes.stopper(), 0.0)


def test_a_controller_that_does_not_answer_is_killed_first(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(run.state, some_state())

    def silent(*args: object, **kwargs: object) -> object:
        raise PeerLost("nobody there")

    monkeypatch.setattr(stop, "ask_controller", silent)
    processes = Processes("decode-0", "controller")
    stop_run(run, processes.stopper(), 1.0)
    assert processes.told[0] == ("controller", signal.SIGKILL)


def test_a_controller_that_answers_is_waited_for(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(run.state, some_state())
    processes = Processes("decode-0", "controller")

    def ends_it_all(*args: object, **kwargs: object) -> object:
        processes.alive.clear()
        state = some_state("stopped")
        save_state(run.state, state)
        return None

    monkeypatch.setattr(stop, "ask_controller", ends_it_all)
    assert stop_run(run, processes.stopper(), 1.0) == 2
    assert processes.told == []


def test_a_run_without_a_readable_state_is_ended_all_the_same(run: RunDir) -> None:
    run.state.write_text("{")
    processes = Processes("decode-0", "controller")
    stop_run(run, processes.stopper(), 1.0)
    assert processes.alive == {}


def test_a_state_that_cannot_be_written_does_not_fail_the_way_down(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(run.state, some_state(state="failed"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stop, "save_state", full)
    assert stop_run(run, Processes().stopper(), 1.0) == 0


# Waiting for ready


class Story:
    """A deployment whose state changes as time passes."""

    def __init__(self, run: RunDir, *steps: Callable[[], None]) -> None:
        self.run = run
        self.steps = list(steps)
        self.processes = Processes("controller")
        self.views: list[DeploymentView] = []
        self.health: dict[str, str] = {}

    def sleep(self, seconds: float) -> None:
        self.processes.now += seconds
        if self.steps:
            self.steps.pop(0)()

    def wait(self, timeout_s: float | None = None, *, adopted: bool = False) -> None:
        stopper = Stopper(self.processes, clock=lambda: self.processes.now, sleep=self.sleep)
        up = Up("d", self.run, "http://h", ProcessHandle(10, 1, 10), adopted)
        waiter = Waiter(stopper, self.views.append, lambda url: Health(self.health.get(url, "")))
        wait_ready(up, waiter, timeout_s)


def writes(run: RunDir, phase: str, **seat: object) -> Callable[[], None]:
    def write() -> None:
        state = some_state(phase, **seat)
        state.reason = "decode-0 gave up: no memory"
        state.controller = ControllerRecord(pid=10, start_ticks=1)
        save_state(run.state, state)

    return write


@pytest.fixture(autouse=True)
def all_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "alive", lambda pid, ticks: pid != 0)


def test_it_returns_when_ready_and_healthy(run: RunDir) -> None:
    save_state(run.state, some_state("starting"))
    story = Story(run, writes(run, "starting"), writes(run, "ready"))
    story.wait(60.0)
    assert [v.phase for v in story.views] == ["starting", "starting", "ready"]
    assert story.processes.alive


def test_a_failure_shows_the_error_lines_and_leaves_nothing_running(run: RunDir) -> None:
    save_state(run.state, some_state("starting"))

    def fail() -> None:
        writes(run, "failed", state="failed", last_error=["RuntimeError: no memory"])()
        story.processes.alive.clear()

    story = Story(run, fail)
    with pytest.raises(
        ProcessExited, match=r"gave up: no memory\n  RuntimeError: no memory\nmore: dynctl logs"
    ):
        story.wait()


def test_a_port_in_use_keeps_its_kind() -> None:
    state = some_state("failed", state="failed", last_kind="port_in_use")
    assert isinstance(failure_of(state, ""), PortInUse)
    assert isinstance(failure_of(some_state("stopped"), ""), NotReady)


def test_too_late_ends_it_and_says_what_hangs(run: RunDir) -> None:
    save_state(run.state, some_state("starting", state="starting"))
    (run.logs / "decode-0.engine.log").write_text("loading weights\n")
    story = Story(run)
    story.processes.alive[11] = "decode-0"
    with pytest.raises(NotReady, match=r"decode-0 is starting\n  loading weights"):
        story.wait(1.0)
    assert story.processes.alive == {}


def test_too_late_for_what_was_adopted_leaves_it_running(run: RunDir) -> None:
    save_state(run.state, some_state("degraded"))
    story = Story(run)
    with pytest.raises(NotReady, match="left running"):
        story.wait(1.0, adopted=True)
    assert story.processes.alive


def test_a_frontend_that_is_never_well_is_told(run: RunDir) -> None:
    state = some_state()
    state.seats += [frontend_seat(index) for index in range(2)]
    save_state(run.state, state)
    story = Story(run)
    story.health = {"http://h:1": "no worker of role decode"}
    with pytest.raises(NotReady, match="frontend-1 is not ready: no worker of role decode"):
        story.wait(3.0)


def test_a_controller_that_dies_at_start_is_told_by_its_last_words(run: RunDir) -> None:
    save_state(run.state, some_state("starting"))
    story = Story(run)
    story.processes.alive.clear()
    LastWords(id="controller", incarnation=1, kind="error", message="no keys").save(run.path)
    with pytest.raises(LaunchError, match="'d' could not be started: no keys"):
        story.wait()


def test_a_controller_that_dies_without_a_word_is_told_by_its_log(run: RunDir) -> None:
    story = Story(run)
    story.processes.alive.clear()
    (run.logs / "controller.log").write_text("Traceback\nImportError: no module\n")
    with pytest.raises(LaunchError, match=r"the controller ended\n  ImportError: no module"):
        story.wait()
