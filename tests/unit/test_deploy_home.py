"""Homes, run directories, locks, state and events on disk."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from dynctl.deploy.events import append_event, read_events
from dynctl.deploy.home import Home, RunDir, make_private, next_name
from dynctl.deploy.state import RunState, SeatRecord, load_state, save_state
from dynctl.errors import CodecError, LaunchError, UsageError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    made.prepare()
    return made


def some_state() -> RunState:
    seat = SeatRecord(id="decode-0", kind="worker", role="decode", index=0, node="n", start_timeout_s=1.0)
    return RunState(
        name="d",
        run_id="r",
        url="u",
        registry="g",
        backend="b",
        model="m",
        roles={},
        created_at=1.0,
        seats=[seat],
    )


def test_home_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Home.find({}).root == tmp_path / ".dynctl"
    assert Home.find({"DYNCTL_HOME": "~/x"}).root == tmp_path / "x"
    assert Home.find({"DYNCTL_HOME": str(tmp_path / "y")}).root == tmp_path / "y"


def test_home_is_for_its_owner_only(home: Home) -> None:
    for folder in (home.root, home.runs, home.deployments):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_place_of_the_home_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(LaunchError, match="cannot be used") as caught:
        Home(tmp_path / "home").prepare()
    assert "DYNCTL_HOME" in caught.value.hint
    assert caught.value.where.endswith("home")


def test_a_name_means_its_latest_run(home: Home) -> None:
    assert home.names() == []
    for run_id in ("a-1", "a-2"):
        run = home.create_run(run_id, {"plan.json": "{}", "specs/x.json": "1"})
        home.point("a", run)
    assert home.names() == ["a"]
    found = home.run_of("a")
    assert found == RunDir(home.runs / "a-2")
    assert found.run_id == "a-2"
    assert found.plan.read_text() == "{}"
    assert found.plan.stat().st_mode & 0o777 == 0o600
    assert found.path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../runs", "missing"])
def test_what_is_no_name_has_no_run(home: Home, name: str) -> None:
    assert home.run_of(name) is None


def test_a_link_to_a_run_that_was_removed_is_no_deployment(home: Home) -> None:
    run = home.create_run("a-1", {})
    home.point("a", run)
    for folder in ("logs", "specs", "exits", "sockets"):
        (run.path / folder).rmdir()
    run.path.rmdir()
    assert home.run_of("a") is None


def test_no_home_has_no_names(tmp_path: Path) -> None:
    assert Home(tmp_path / "none").names() == []


def test_a_run_that_cannot_be_written_whole_leaves_nothing(home: Home) -> None:
    with pytest.raises(LaunchError, match="run directory cannot be written"):
        home.create_run("a-1", {"plan.json": "{}", "missing/x": "1"})
    assert list(home.runs.iterdir()) == []


def test_a_lock_is_held_against_others_and_given_back(home: Home) -> None:
    entered = threading.Event()
    leave = threading.Event()

    def hold() -> None:
        with home.locked("a", deadline_s=1.0):
            entered.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(10)
    with (
        pytest.raises(UsageError, match="another dynctl command is working on 'a'"),
        home.locked("a", deadline_s=0.0),
    ):
        pass
    leave.set()
    holder.join()
    with home.locked("a", deadline_s=1.0):
        pass


def test_a_lock_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="lock"), Home(tmp_path / "none").locked("a", deadline_s=0.0):
        pass


def test_state_is_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert load_state(path) is None
    save_state(path, some_state())
    assert load_state(path) == some_state()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["state.json"]
    assert some_state().seat("decode-0") is not None
    assert some_state().seat("decode-1") is None


def test_a_state_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text("{")
    with pytest.raises(CodecError, match="not a state"):
        load_state(path)
    save_state(path, some_state())
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(CodecError, match="state version 99"):
        load_state(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CodecError, match="cannot be read"):
        load_state(path)


def test_a_state_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(OSError, match="directory"):
        save_state(target, some_state())
    assert os.listdir(tmp_path) == ["folder"]


def test_events_are_read_whole_and_in_order(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ([], 0)
    append_event(path, 1.0, "process.started", id="decode-0", pid=7)
    with path.open("a") as file:
        file.write("not an event\n{}\n")
    append_event(path, 2.0, "process.ready", id="decode-0")
    with path.open("a") as file:
        file.write('{"ts": 3, "event": "half')
    found, offset = read_events(path)
    assert [e["event"] for e in found] == ["process.started", "process.ready"]
    with path.open("a") as file:
        file.write(json.dumps("x")[1:-1] + '"}\n')
    found, _ = read_events(path, offset)
    assert [e["event"] for e in found] == ["halfx"]


def test_directories_that_were_open_to_others_are_closed_with_one_message(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.root.chmod(0o777)
    home.runs.chmod(0o755)
    home.prepare()
    assert home.root.stat().st_mode & 0o777 == 0o755
    assert home.runs.stat().st_mode & 0o777 == 0o700
    assert caplog.text.count("mode 0755") == 1
    home.prepare()
    assert caplog.text.count("mode 0755") == 1
    there = home.create_node("run-1", "n1", {}).path
    there.chmod(0o750)
    home.create_node("run-1", "n1", {})
    assert there.stat().st_mode & 0o777 == 0o700


def test_a_directory_of_another_user_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home.create_run("r-1", {}).path
    uid = folder.stat().st_uid
    monkeypatch.setattr("os.geteuid", lambda: uid + 1)
    with pytest.raises(LaunchError, match=f"belongs to user {uid}, not {uid + 1}") as refused:
        make_private(folder)
    assert "DYNCTL_HOME" in refused.value.hint
    if uid:
        with pytest.raises(LaunchError, match="could replace what is in it"):
            home.prepare()


def test_two_recipes_that_are_to_be_applied_at_once_have_two_names(home: Home) -> None:
    run = home.create_run("r-1", {})
    names = {next_name() for _ in range(10)}
    assert len({run.next(name) for name in names}) == 10
    for name in ("recipe.lock.yaml", "../r-2/recipe.next.00.yaml", "recipe.next.yaml"):
        with pytest.raises(UsageError, match="no recipe that was put there"):
            run.next(name)


def test_hosts_with_one_home_and_the_same_pid_do_not_take_each_others_probe(home: Home) -> None:
    failed: list[LaunchError] = []

    def prepare() -> None:
        try:
            for _ in range(100):
                home.prepare()
        except LaunchError as error:
            failed.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
