"""An engine whose health is fine and whose generation hangs, as a real process under a real sidecar."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dynctl.http.client import Client, Origin
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import EngineProcess, WorkerSpec
from dynctl.transport.keys import save_engine_key
from tests.integration.worker_rig import Rig, until


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    made = Rig(tmp_path)
    yield made
    await made.close()


def mocker(rig: Rig, **fields: float) -> WorkerSpec:
    argv = [sys.executable, "-m", "dynctl.mocker", "--served-model-name", "m", "--port", str(rig.port)]
    spec = {"canary_interval_s": 0.5, "canary_timeout_s": 0.5, **fields}
    return rig.spec(backend="mocker", model=ModelCard(name="m"), engine=EngineProcess(argv=argv), **spec)


def state(rig: Rig) -> str:
    member = rig.member()
    return member.state if member is not None else ""


async def ask_mocker(rig: Rig, method: str, path: str, body: bytes = b"") -> bytes:
    client = Client()
    try:
        origin = Origin.parse(f"http://127.0.0.1:{rig.port}")
        return (await client.request(origin, method, path, body=body, timeout_s=10)).body
    finally:
        await client.close()


async def test_an_engine_that_is_healthy_but_generates_nothing_is_taken_out_and_comes_back(rig: Rig) -> None:
    rig.start(mocker(rig))
    await rig.ready()
    await ask_mocker(rig, "POST", "/mock/faults", b'{"hang": true}')
    await until(lambda: state(rig) == "silent")
    await ask_mocker(rig, "GET", "/health")
    await ask_mocker(rig, "POST", "/mock/faults", b'{"hang": false}')
    await until(lambda: state(rig) == "ready")


async def test_canaries_leave_the_prefix_cache_as_it_is(rig: Rig) -> None:
    """Each is a prompt that fills no block: neither a hit nor a block that pushes another out."""
    rig.start(mocker(rig, canary_interval_s=0.25))
    await rig.ready()

    async def canaries() -> float:
        text = (await ask_mocker(rig, "GET", "/metrics")).decode()
        lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    while await canaries() < 3:
        pass
    assert b'"cached":[]' in (await ask_mocker(rig, "GET", "/mock/state")).replace(b" ", b"")


async def test_a_sidecar_knows_the_key_its_engine_asks_for(rig: Rig) -> None:
    """Readiness, load and canary would else be refused, and the engine never be ready."""
    save_engine_key(rig.run_dir / "engine.key")
    spec = mocker(rig, canary_interval_s=0.25)
    rig.start(msgspec.structs.replace(spec, engine_key_file="engine.key", engine_key_variable="VLLM_API_KEY"))
    await rig.ready()
    client, origin = Client(), Origin.parse(f"http://127.0.0.1:{rig.port}")
    try:
        models = await client.request(origin, "GET", "/v1/models", timeout_s=10)
    finally:
        await client.close()
    assert models.status == 401
    while b"vllm:request_success_total" not in await ask_mocker(rig, "GET", "/metrics"):
        pass
