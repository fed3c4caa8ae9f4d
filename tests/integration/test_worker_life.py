"""A sidecar's life with a real child process: start, failure in each way, drain, end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dynctl.http.client import Client, Origin
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import EngineProcess
from tests.integration.worker_rig import Rig, alive, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    yield made
    await made.close()


async def set_running(rig: Rig, count: int) -> None:
    client = Client()
    await client.request(
        Origin.parse(f"http://127.0.0.1:{rig.port}"), "POST", f"/running/{count}", timeout_s=5
    )
    await client.close()


async def test_ready_worker_is_registered_with_what_its_engine_says(rig: Rig) -> None:
    process = rig.start(rig.spec())
    instance = await rig.ready()
    assert instance.pid == process.pid
    assert alive(instance.engine_pid)
    assert os.getpgid(instance.engine_pid) == instance.engine_pid
    assert instance.model == ModelCard(name="m", block_size=16, max_model_len=512, adapters=["lora-a"])
    assert instance.events.startswith("tcp://127.0.0.1:")
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert not alive(instance.engine_pid)
    assert rig.member() is None
    assert not (rig.run_dir / "exits").exists()


async def test_slow_start_is_waited_for(rig: Rig) -> None:
    rig.start(rig.spec(engine=rig.engine("--delay", "1.5")))
    instance = await rig.ready()
    assert alive(instance.engine_pid)


async def test_engine_too_slow_is_not_ready_in_time(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=rig.engine("--delay", "60"), start_timeout_s=1.0))
    assert await rig.exit_code(process) == 1
    words = rig.words()
    assert words.kind == "not_ready"
    assert "not ready within 1 s" in words.message
    assert "does not listen" in words.message


async def test_engine_that_dies_at_start_leaves_code_and_error_lines(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=rig.engine("--die", "7")))
    assert await rig.exit_code(process) == 1
    words = rig.words()
    assert (words.kind, words.exit_code) == ("process_exited", 7)
    assert "before it was ready" in words.message
    assert any("weights are missing" in line for line in words.lines)
    assert rig.member() is None


async def test_lines_of_an_earlier_start_are_not_blamed(rig: Rig) -> None:
    log = rig.run_dir / "logs" / "decode-0.engine.log"
    log.parent.mkdir()
    log.write_text("RuntimeError: an old story\n")
    process = rig.start(rig.spec(engine=rig.engine("--die", "7")))
    await rig.exit_code(process)
    assert not any("old story" in line for line in rig.words().lines)
    assert log.read_text().startswith("RuntimeError: an old story\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/nowhere/python"], "does not exist"),
        (["no-such-program-anywhere"], "does not exist"),
        (["/etc/passwd"], "not executable"),
    ],
)
async def test_engine_binary_that_is_missing_is_permanent(rig: Rig, argv: list[str], message: str) -> None:
    process = rig.start(rig.spec(engine=EngineProcess(argv=argv)))
    assert await rig.exit_code(process) == 1
    words = rig.words()
    assert words.kind == "launch"
    assert words.permanent
    assert message in words.message


async def test_engine_working_directory_that_is_missing_is_named(rig: Rig) -> None:
    engine = msgspec.structs.replace(rig.engine(), cwd="/nowhere")
    process = rig.start(rig.spec(engine=engine))
    assert await rig.exit_code(process) == 1
    assert "working directory" in rig.words().message


async def test_port_taken_before_the_start_is_named_with_its_holder(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", rig.port))
        taken.listen()
        process = rig.start(rig.spec())
        assert await rig.exit_code(process) == 1
    words = rig.words()
    assert words.kind == "port_in_use"
    assert f"port {rig.port} is held by pid {os.getpid()}" in words.message
    assert not (rig.run_dir / "logs").exists()


async def test_port_taken_while_the_engine_loads_is_noticed(rig: Rig) -> None:
    """Another process answers where the engine should: it must not be taken for the engine."""
    process = rig.start(rig.spec(engine=rig.engine("--delay", "30")))
    await until(lambda: "engine.started" in rig.log())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", rig.port))
        taken.listen()
        assert await rig.exit_code(process) == 1
    words = rig.words()
    assert words.kind == "port_in_use"
    assert f"held by pid {os.getpid()}" in words.message


async def test_engine_that_finds_its_port_taken_is_reported_as_such(rig: Rig) -> None:
    with socket.socket() as taken:
        process = rig.start(rig.spec(engine=rig.engine("--delay", "0.6")))
        await until(lambda: "engine.started" in rig.log())
        taken.bind(("127.0.0.1", rig.port))
        taken.listen()
        assert await rig.exit_code(process) == 1
    assert rig.words().kind == "port_in_use"


async def test_engine_that_serves_another_model_is_permanent(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=rig.engine("--model", "other")))
    assert await rig.exit_code(process) == 1
    words = rig.words()
    assert words.permanent
    assert "serves other, lora-a, not m" in words.message


async def test_killed_engine_ends_its_sidecar_with_the_signal(rig: Rig) -> None:
    process = rig.start(rig.spec())
    instance = await rig.ready()
    os.kill(instance.engine_pid, signal.SIGKILL)
    assert await rig.exit_code(process) == 1
    words = rig.words()
    assert (words.kind, words.exit_code) == ("process_exited", -9)
    assert "SIGKILL" in words.message
    assert rig.member() is None


async def test_killed_sidecar_takes_the_engine_and_its_children_along(rig: Rig, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    process = rig.start(rig.spec(engine=rig.engine("--grandchild", str(note), "--ignore-term")))
    instance = await rig.ready()
    grandchild = int(note.read_text())
    assert alive(grandchild)
    os.kill(process.pid, signal.SIGKILL)
    await until(lambda: not alive(instance.engine_pid))
    await until(lambda: not alive(grandchild))


async def test_stubborn_engine_is_killed_with_its_whole_group(rig: Rig, tmp_path: Path) -> None:
    note = tmp_path / "grandchild"
    engine = rig.engine("--grandchild", str(note), "--ignore-term")
    process = rig.start(rig.spec(engine=engine, stop_timeout_s=0.5))
    instance = await rig.ready()
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert not alive(instance.engine_pid)
    await until(lambda: not alive(int(note.read_text())))


async def test_drain_waits_for_running_requests(rig: Rig) -> None:
    process = rig.start(rig.spec())
    instance = await rig.ready()
    await set_running(rig, 2)
    process.terminate()
    await until(lambda: (m := rig.member()) is not None and m.state == "draining")
    await asyncio.sleep(0.6)
    assert process.poll() is None
    assert alive(instance.engine_pid)
    await set_running(rig, 0)
    assert await rig.exit_code(process) == 0
    assert "idle=True" in rig.log()
    assert rig.member() is None


async def test_drain_ends_at_its_deadline(rig: Rig) -> None:
    process = rig.start(rig.spec(drain_timeout_s=0.5))
    await rig.ready()
    await set_running(rig, 1)
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert "idle=False" in rig.log()


async def test_second_sigterm_skips_the_drain(rig: Rig) -> None:
    process = rig.start(rig.spec(drain_timeout_s=300))
    instance = await rig.ready()
    await set_running(rig, 1)
    process.terminate()
    await until(lambda: (m := rig.member()) is not None and m.state == "draining")
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert not alive(instance.engine_pid)


async def test_sigterm_before_ready_ends_at_once(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=rig.engine("--delay", "60")))
    await until(lambda: "engine.started" in rig.log())
    process.terminate()
    assert await rig.exit_code(process) == 0
    assert rig.member() is None


async def test_superseded_sidecar_stops_its_engine_and_exits(rig: Rig) -> None:
    process = rig.start(rig.spec(engine=rig.engine("--ignore-term")), incarnation=1)
    instance = await rig.ready()
    rig.registry.set_current("decode-0", 2)
    assert await rig.exit_code(process) == 3
    assert not alive(instance.engine_pid)
    assert rig.words().kind == "superseded"


async def test_registry_that_is_away_does_not_stop_a_worker(rig: Rig) -> None:
    spec = rig.spec(registry="tcp://127.0.0.1:1")
    process = rig.start(spec)
    await until(lambda: "worker.ready" in rig.log())
    process.terminate()
    assert await rig.exit_code(process) == 0


async def test_follower_supervises_and_registers_nothing(rig: Rig) -> None:
    spec = rig.spec(follower=True, id="decode-0.1", engine=rig.engine("--delay", "60"))
    process = rig.start(spec)
    await until(lambda: "engine.started" in rig.log("decode-0.1"))
    process.terminate()
    assert await rig.exit_code(process) == 0
    again = rig.start(msgspec.structs.replace(spec, engine=rig.engine("--die", "5")), incarnation=2)
    assert await rig.exit_code(again) == 1
    assert rig.words(2, "decode-0.1").exit_code == 5
    assert rig.member() is None


async def test_follower_without_an_engine_is_refused(rig: Rig) -> None:
    process = rig.start(rig.spec(follower=True, engine=None))
    assert await rig.exit_code(process) == 1
    assert rig.words().permanent


async def test_keys_open_to_others_are_refused(rig: Rig) -> None:
    (rig.run_dir / "keys.json").chmod(0o644)
    process = rig.start(rig.spec())
    assert await rig.exit_code(process) == 1
    assert "open to others" in rig.words().message


async def test_taken_event_port_is_refused_and_no_engine_started(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = rig.start(rig.spec(events_port=taken.getsockname()[1]))
        assert await rig.exit_code(process) == 1
    assert rig.words().kind == "port_in_use"
    assert "engine.started" not in rig.log()
