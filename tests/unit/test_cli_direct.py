"""A deployment on other machines, asked from here without SSH: only where that is safe and quick."""

from __future__ import annotations

import asyncio
import json
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from dynctl.cli.direct import ask_from_here
from dynctl.cli.ls import line, ls
from dynctl.cli.pick import Elsewhere
from dynctl.cli.ps import ps
from dynctl.deploy.home import Home, RunDir, made_at, new_run_id
from dynctl.deploy.remote_note import Remote, RemoteHost, save_keys, save_remote
from dynctl.protocol.deployment import DeploymentView, ProcessView
from dynctl.topology.inventory import Ssh
from dynctl.transport.control import ControlServer
from dynctl.transport.keys import Keys

ROW = ProcessView(
    id="decode-0",
    role="decode",
    index=0,
    instance="decode-0",
    node="n1",
    state="ready",
    ready=True,
    pid=7,
    engine_pid=8,
    restarts=0,
    url="http://n1:1",
    incarnation=1,
)
SEEN = DeploymentView(
    name="far",
    run_id="far-1",
    run_dir="/there",
    url="http://n1:2",
    phase="ready",
    reason="",
    controller_pid=5,
    wanted={"decode": 1},
    processes=[ROW],
)


@contextmanager
def controller(keys: Keys) -> Iterator[str]:
    """A controller that answers with `SEEN`; its endpoint."""
    started, over = threading.Event(), threading.Event()
    found: list[str] = []

    async def answer(op: str, body: msgspec.Raw) -> msgspec.Struct:
        assert op == "controller.status"
        return SEEN

    async def serve() -> None:
        server = ControlServer(keys, "tcp://127.0.0.1:*", answer)
        found.append(server.start())
        started.set()
        await asyncio.to_thread(over.wait)
        await server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(10.0)
        yield found[0]
    finally:
        over.set()
        thread.join()


def noted(tmp_path: Path, keys: Keys | None, endpoint: str, *, ended: bool = False) -> RunDir:
    """The note of a deployment whose controller is there."""
    note = Home(tmp_path).make_note("far")
    if keys is not None:
        keys.save(tmp_path / "made.json")
        save_keys(note, (tmp_path / "made.json").read_text())
    host = RemoteHost(name="n1", python="python3", home="/there", ssh=Ssh("n1"))
    remote = Remote(name="far", run_id="far-1", hosts=[host], recipe="", controller=endpoint, ended=ended)
    save_remote(note, remote)
    return note


def test_ps_is_answered_by_the_controller_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = Keys.generate()
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    with controller(keys) as endpoint:
        note = noted(tmp_path, keys, endpoint)
        ps("far", as_json=True)
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["decode-0"]
    assert stat.S_IMODE(note.keys.stat().st_mode) == 0o600


def test_a_controller_with_other_keys_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynctl.cli.direct._ANSWER_S", 0.5)
    with controller(Keys.generate()) as endpoint:
        assert ask_from_here(noted(tmp_path, Keys.generate(), endpoint)) is None


def test_without_keys_or_a_listener_or_after_its_end_it_goes_by_ssh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    keys = Keys.generate()
    with controller(keys) as endpoint:
        assert ask_from_here(noted(tmp_path, None, endpoint)) is None
        assert ask_from_here(noted(tmp_path, keys, "")) is None
        assert ask_from_here(noted(tmp_path, keys, endpoint, ended=True)) is None
        assert ask_from_here(noted(tmp_path, keys, endpoint)) == SEEN
    note = noted(tmp_path, keys, endpoint)
    assert ask_from_here(note) is None
    with pytest.raises(Elsewhere):
        ps("far")
    save_keys(note, "")
    assert not note.keys.exists()


def test_ls_shows_a_deployment_elsewhere_as_its_controller_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNCTL_HOME", str(tmp_path))
    keys = Keys.generate()
    with controller(keys) as endpoint:
        told = line(noted(tmp_path, keys, endpoint), "far")
        assert (told["phase"], told["ready"], told["url"]) == ("ready", "1/1D", "http://n1:2")
        told = line(noted(tmp_path, keys, ""), "far")
        assert (told["phase"], told["ready"], told["url"]) == ("remote", "", "")
        told = line(noted(tmp_path, keys, endpoint, ended=True), "far")
        assert (told["phase"], told["ready"]) == ("stopped", "")
    assert told["run_dir"] == "n1:/there/runs/far-1"
    ls()
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["far", "stopped", "-"], "no empty cells"


def test_the_age_of_a_run_is_told_by_its_id() -> None:
    assert made_at(new_run_id("a-b", time.gmtime(1_700_000_000))) == 1_700_000_000
    assert made_at("far-1") == 0.0
