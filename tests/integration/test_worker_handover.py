"""A sidecar becomes that of another seat with its engine under it: what it is known by, and how it ends."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dynctl.errors import UsageError
from dynctl.protocol.handover import Become
from dynctl.protocol.instances import Instance
from dynctl.protocol.specs import WorkerSpec
from dynctl.transport.control import ControlClient
from tests.integration.test_worker_life import set_running
from tests.integration.worker_rig import Rig, alive, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    (tmp_path / "specs").mkdir()
    yield made
    await made.close()


def other(rig: Rig, **changes: Any) -> WorkerSpec:
    """The same engine for prefill."""
    named = {"id": "prefill-4", "role": "prefill", "index": 4, "engine_log": "logs/prefill-4.engine.log"}
    return rig.spec(**{**named, **changes})


async def ask(rig: Rig, at: Instance, spec: WorkerSpec, incarnation: int = 7) -> None:
    client = ControlClient(rig.keys, at.control)
    call = Become(id=spec.id, incarnation=incarnation, spec=msgspec.json.encode(spec).decode())
    try:
        await client.call("worker.become", call, type(None), 5.0)
    finally:
        client.close()


async def become(rig: Rig, at: Instance, spec: WorkerSpec, incarnation: int = 7) -> Instance:
    await ask(rig, at, spec, incarnation)
    await until(lambda: bool((m := rig.member()) and m.instance.id == spec.id), 30)
    member = rig.member()
    assert member is not None
    return member.instance


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")


async def test_it_is_the_same_process_under_another_name_with_the_same_engine(rig: Rig) -> None:
    process = rig.start(rig.spec())
    before = await rig.ready()
    after = await become(rig, before, other(rig))
    assert (after.role, after.index, after.incarnation) == ("prefill", 4, 7)
    assert (after.pid, after.engine_pid) == (process.pid, before.engine_pid)
    assert {"DYNCTL_PROCESS=prefill-4", "DYNCTL_INCARNATION=7", "DYNCTL_TOOK=decode-0 1"} <= set(
        environment(process.pid)
    )
    # And on: what the engine was started as stays.
    again = await become(rig, after, rig.spec(id="decode-1", engine_log="logs/decode-1.engine.log"), 3)
    assert (again.pid, again.engine_pid) == (process.pid, before.engine_pid)
    assert "DYNCTL_TOOK=decode-0 1" in environment(process.pid)
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert not alive(before.engine_pid)
    assert rig.member() is None


async def test_an_engine_that_dies_then_is_told_of_under_the_new_name(rig: Rig) -> None:
    process = rig.start(rig.spec())
    before = await rig.ready()
    await become(rig, before, other(rig))
    os.kill(before.engine_pid, signal.SIGKILL)
    assert await rig.exit_code(process) == 1
    words = rig.words(incarnation=7, seat="prefill-4")
    assert (words.kind, words.exit_code) == ("process_exited", -signal.SIGKILL)
    logs = {path.name for path in (rig.run_dir / "logs").iterdir()}
    assert logs == {"prefill-4.log", "prefill-4.engine.log"}
    assert "worker.ready id=prefill-4" in (rig.run_dir / "logs" / "prefill-4.log").read_text()


async def test_an_engine_does_not_outlive_a_sidecar_that_was_killed_as_another(rig: Rig) -> None:
    process = rig.start(rig.spec())
    before = await rig.ready()
    await become(rig, before, other(rig))
    process.kill()
    await until(lambda: not alive(before.engine_pid), 10)


async def test_the_log_of_an_earlier_engine_of_that_name_is_kept(rig: Rig) -> None:
    folder = rig.run_dir / "logs"
    folder.mkdir()
    (folder / "prefill-4.engine.log").write_text("an old story\n")
    rig.start(rig.spec())
    await become(rig, await rig.ready(), other(rig))
    assert (folder / "prefill-4.engine.before-7.log").read_text() == "an old story\n"
    assert "an old story" not in (folder / "prefill-4.engine.log").read_text()


async def test_another_engine_than_its_own_is_refused_and_it_serves_on(rig: Rig) -> None:
    rig.start(rig.spec())
    before = await rig.ready()
    for spec in (
        other(rig, engine=rig.engine("--delay", "1")),
        other(rig, engine=None),
        other(rig, url="http://127.0.0.1:1"),
    ):
        with pytest.raises(UsageError, match="not that of prefill-4"):
            await ask(rig, before, spec)
    member = rig.member()
    assert member is not None
    assert (member.instance.id, member.state) == ("decode-0", "ready")


async def test_one_that_is_told_to_end_while_it_drains_ends(rig: Rig) -> None:
    process = rig.start(rig.spec())
    before = await rig.ready()
    await set_running(rig, 1)
    await ask(rig, before, other(rig))
    await until(lambda: bool((m := rig.member()) and m.state == "draining"))
    with pytest.raises(UsageError, match="about to become prefill-4"):
        await ask(rig, before, other(rig))
    process.terminate()
    await set_running(rig, 0)
    assert await rig.exit_code(process) == 0
    assert not alive(before.engine_pid)
    assert not (rig.run_dir / "specs" / "prefill-4.json").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGURG])
async def test_one_that_is_told_to_end_while_it_begins_anew_ends_as_told(rig: Rig, number: int) -> None:
    """It has become the other, but handles no signals yet: SIGURG would be lost, SIGTERM end it at once."""
    process = rig.start(rig.spec())
    before = await rig.ready()
    await ask(rig, before, other(rig))
    await until(lambda: "DYNCTL_PROCESS=prefill-4" in environment(process.pid))
    process.send_signal(number)
    assert await rig.exit_code(process) == 0
    assert not alive(before.engine_pid)
