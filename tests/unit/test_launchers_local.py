"""The local launcher with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dynctl import procfs
from dynctl.command import Command
from dynctl.errors import LaunchError
from dynctl.launchers.base import Launch, Owned, ProcessHandle, RunRef, heads
from dynctl.launchers.local import LocalLauncher

SLEEP = "import time; time.sleep(60)"


def eventually(check: Callable[[], bool], within_s: float = 10.0) -> bool:
    ends = time.monotonic() + within_s
    while time.monotonic() < ends:
        if check():
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def run(tmp_path: Path) -> RunRef:
    return RunRef(f"test-{os.getpid()}-{tmp_path.name}", tmp_path)


class Tracked(LocalLauncher):
    """Remembers what it started, so that the test can reap it."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[ProcessHandle] = []

    def start(self, launch: Launch, run: RunRef) -> ProcessHandle:
        handle = super().start(launch, run)
        self.started.append(handle)
        return handle


@pytest.fixture
def launcher(run: RunRef) -> Iterator[LocalLauncher]:
    made = Tracked()
    yield made
    made.kill(made.owned(run.run_id))
    assert eventually(lambda: not made.owned(run.run_id))
    made.poll(made.started)


def python(code: str, seat: str = "decode-0", **command: object) -> Launch:
    return Launch(seat, 2, Command((sys.executable, "-c", code), **command), "n1")  # type: ignore[arg-type]


def ended(launcher: LocalLauncher, handle: ProcessHandle) -> int | None:
    codes: list[int | None] = []

    def poll() -> bool:
        codes.extend(e.code for e in launcher.poll([handle]))
        return bool(codes)

    assert eventually(poll)
    return codes[0]


def test_output_environment_and_files_are_as_the_command_says(launcher: LocalLauncher, run: RunRef) -> None:
    code = (
        "import os,sys; print(os.getcwd()); print(open('specs/a.json').read());"
        "print(*(os.environ[k] for k in ('DYNCTL_RUN','DYNCTL_PROCESS','DYNCTL_INCARNATION','X')));"
        "sys.stderr.write('oops\\n'); print(os.getsid(0) == os.getpid()); sys.exit(3)"
    )
    launch = python(code, env={"X": "y"}, files={"specs/a.json": "{}"})
    assert ended(launcher, launcher.start(launch, run)) == 3
    text = (run.run_dir / "logs" / "decode-0.log").read_text()
    assert str(run.run_dir) in text
    assert f"{run.run_id} decode-0 2 y" in text
    assert "oops" in text
    assert "True" in text
    for path in ("specs/a.json", "logs/decode-0.log"):
        assert (run.run_dir / path).stat().st_mode & 0o777 == 0o600


def test_a_withheld_variable_of_ours_is_not_handed_on(
    launcher: LocalLauncher, run: RunRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "hidden")
    code = "import os,sys; sys.exit('A_KEY' in os.environ)"
    launch = replace(python(code), withheld=frozenset({"A_KEY", "NOT_SET"}))
    assert ended(launcher, launcher.start(launch, run)) == 0
    assert ended(launcher, launcher.start(python(code), run)) == 1
    wanted = replace(python(code, env={"A_KEY": "by the recipe"}), withheld=frozenset({"A_KEY"}))
    assert ended(launcher, launcher.start(wanted, run)) == 1


def test_a_second_incarnation_appends_to_the_log(launcher: LocalLauncher, run: RunRef) -> None:
    for word in ("one", "two"):
        ended(launcher, launcher.start(python(f"print('{word}')"), run))
    assert (run.run_dir / "logs" / "decode-0.log").read_text() == "one\ntwo\n"


def test_a_missing_program_is_named(launcher: LocalLauncher, run: RunRef) -> None:
    with pytest.raises(LaunchError, match="no such program or directory: /nonexistent/engine") as caught:
        launcher.start(Launch("decode-0", 1, Command(("/nonexistent/engine",)), "n1"), run)
    assert caught.value.where == "n1"


def test_a_program_that_may_not_be_run_is_named(launcher: LocalLauncher, run: RunRef) -> None:
    program = run.run_dir / "engine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o600)
    with pytest.raises(LaunchError, match="no permission"):
        launcher.start(Launch("decode-0", 1, Command((str(program),)), "n1"), run)


def test_a_run_directory_that_cannot_be_written_is_named(launcher: LocalLauncher, run: RunRef) -> None:
    (run.run_dir / "logs").write_text("a file where a directory should be")
    with pytest.raises(LaunchError, match="decode-0 could not be started"):
        launcher.start(python("pass"), run)


def test_signals_reach_exactly_the_process_of_the_handle(launcher: LocalLauncher, run: RunRef) -> None:
    handle = launcher.start(python(SLEEP), run)
    assert launcher.poll([handle]) == []
    stranger = ProcessHandle(handle.pid, handle.start_ticks + 1, handle.pgid)
    assert not launcher.signal(stranger, signal.SIGKILL)
    assert launcher.signal(handle, signal.SIGTERM)
    assert ended(launcher, handle) == -signal.SIGTERM
    assert not launcher.signal(handle, signal.SIGTERM)


def test_a_pid_used_again_counts_as_ended(launcher: LocalLauncher) -> None:
    own = procfs.stat(os.getpid())
    assert own is not None
    stranger = ProcessHandle(os.getpid(), own.start_ticks + 1, 0)
    assert [e.code for e in launcher.poll([stranger])] == [None]
    assert launcher.poll([ProcessHandle(os.getpid(), own.start_ticks, 0)]) == []


def test_owned_finds_children_that_threw_their_environment_away(launcher: LocalLauncher, run: RunRef) -> None:
    code = (
        "import subprocess,sys,time;"
        f"subprocess.Popen([sys.executable,'-c',{SLEEP!r}],env={{}},start_new_session=True);"
        f"subprocess.Popen([sys.executable,'-c',{SLEEP!r}],env={{'DYNCTL_RUN':'another'}});"
        "time.sleep(60)"
    )
    handle = launcher.start(python(code), run)
    assert eventually(lambda: len(launcher.owned(run.run_id)) == 2)
    owned = launcher.owned(run.run_id)
    assert {(o.process_id, o.incarnation) for o in owned} == {("decode-0", 2)}
    assert [o.handle.pid for o in heads(owned)] == [handle.pid]
    assert eventually(lambda: [o.process_id for o in launcher.owned("another")] == [""])
    launcher.kill([*owned, *launcher.owned("another")])
    assert eventually(lambda: not launcher.owned(run.run_id) and not launcher.owned("another"))


def test_an_engine_that_a_sidecar_has_taken_over_is_of_its_seat(launcher: LocalLauncher, run: RunRef) -> None:
    """A new process that has the engine's former name must not be its end, nor may the engine be left."""
    engine = (
        "import os,subprocess,sys,time;"
        "env={**os.environ,'DYNCTL_PROCESS':'prefill-0','DYNCTL_INCARNATION':'3'};del env['DYNCTL_TOOK'];"
        f"subprocess.Popen([sys.executable,'-c',{SLEEP!r}],env=env,start_new_session=True);"
        "time.sleep(60)"
    )
    command = python(engine).command
    took = replace(command, env={**command.env, "DYNCTL_TOOK": "prefill-0 3"})
    handle = launcher.start(Launch("decode-0", 2, took, "n1"), run)
    fresh = launcher.start(Launch("prefill-0", 4, python(SLEEP).command, "n1"), run)
    assert eventually(lambda: len(launcher.owned(run.run_id)) == 3)
    names = sorted((o.process_id, o.incarnation) for o in launcher.owned(run.run_id))
    assert names == [("decode-0", 2), ("decode-0", 2), ("prefill-0", 4)]
    assert {o.handle.pid for o in heads(launcher.owned(run.run_id))} == {handle.pid, fresh.pid}


def test_killing_spares_a_process_that_took_the_pid(launcher: LocalLauncher, run: RunRef) -> None:
    handle = launcher.start(python(SLEEP), run)
    stranger = ProcessHandle(handle.pid, handle.start_ticks + 1, handle.pgid)
    launcher.kill([Owned(stranger, 1, "decode-0", 2)])
    assert launcher.poll([handle]) == []


def test_a_released_child_lives_on(launcher: LocalLauncher, run: RunRef) -> None:
    handle = launcher.start(python(SLEEP), run)
    launcher.release(handle)
    launcher.release(handle)
    assert procfs.alive(handle.pid, handle.start_ticks)


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    try:
        assert eventually(lambda: (s := procfs.stat(child.pid)) is not None and not s.alive)
        stat = procfs.stat(child.pid)
        assert stat is not None
        assert not procfs.alive(child.pid, stat.start_ticks)
    finally:
        child.wait()
    assert procfs.stat(child.pid) is None
    assert procfs.environment(child.pid) == {}


def test_names_with_blanks_and_parentheses_do_not_shift_the_fields(tmp_path: Path) -> None:
    folder = tmp_path / "7"
    folder.mkdir()
    fields = " ".join(["S", "1", "6", *["0"] * 16, "4242", "0"])
    (folder / "stat").write_text(f"7 (a ) b) {fields}\n")
    assert procfs.stat(7, tmp_path) == procfs.Stat(7, "S", 1, 6, 0, 4242)
