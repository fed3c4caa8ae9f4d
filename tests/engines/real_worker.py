"""One real engine process for a test: started as the engine contract says, ended with all its children."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynctl.command import Command
from dynctl.engines.base import ArgValue, EngineEnvironment, EngineLaunch, ModelRef, Parallel, Rank
from dynctl.engines.kv_sockets import FOLDER
from dynctl.engines.vllm import Vllm
from dynctl.protocol.instances import Role
from tests.engines import environment

START_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 20.0
BLOCK_SIZE = 32
CPU_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "UCX_TLS": "tcp",
}
CPU_ARGS: dict[str, ArgValue] = {
    "block-size": BLOCK_SIZE,
    "dtype": "float32",
    "enforce-eager": True,
    "max-model-len": 2048,
    "num-gpu-blocks-override": 128,
}


@dataclass(frozen=True)
class Worker:
    """A ready engine."""

    launch: EngineLaunch
    url: str
    log: Path

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
        """Send JSON, answer JSON; an HTTP error raises with its body in the message."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                found: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read()[:500]!r}") from error
        return found

    def get(self, path: str, timeout_s: float = 30.0) -> bytes:
        """The body of a GET."""
        with urllib.request.urlopen(self.url + path, timeout=timeout_s) as answer:
            body: bytes = answer.read()
        return body


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with_sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(held.getsockname()[1]) for held in with_sockets]
    for held in with_sockets:
        held.close()
    return ports


def environment_of(command: Command) -> dict[str, str]:
    """The environment a process of this command gets."""
    return {**os.environ, **command.env}


def tiny_launch(role: Role, *, disaggregated: bool = False, http_port: int = 0) -> EngineLaunch:
    """A replica of the tiny model on this machine's CPU; `http_port` 0 = any free one."""
    engine, parallel = Vllm(), Parallel()
    needs = engine.port_needs(role, parallel, disaggregated=disaggregated)
    ports = dict(zip(needs, free_ports(len(needs)), strict=True))
    return EngineLaunch(
        model=ModelRef(path=str(environment.tiny_model_folder()), served_name="tiny"),
        role=role,
        index=0,
        parallel=parallel,
        ranks=(Rank(node="local", address="127.0.0.1"),),
        ports=ports | ({"http": http_port} if http_port else {}),
        environment=EngineEnvironment(venv=str(environment.vllm_venv())),
        args=CPU_ARGS,
        env=CPU_ENV,
        disaggregated=disaggregated,
    )


@contextmanager
def running(launch: EngineLaunch, folder: Path) -> Iterator[Worker]:
    """Start the head's command, wait until it serves, and end its process group at the end."""
    (command,) = Vllm().commands(launch)
    log = folder / f"{launch.role}.log"
    (folder / FOLDER).mkdir(exist_ok=True)
    url = f"http://{launch.ranks[0].address}:{launch.ports['http']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.argv,
            env=environment_of(command),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        worker = Worker(launch, url, log)
        _wait_ready(worker, process)
        yield worker
    finally:
        _stop(process)


def _wait_ready(worker: Worker, process: subprocess.Popen[bytes]) -> None:
    readiness = Vllm.readiness
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            worker.get(readiness.health, 5.0)
            assert b'"tiny"' in worker.get(readiness.models, 5.0)
            return
        except OSError:
            time.sleep(0.25)
    lines = worker.log.read_text(encoding="utf-8", errors="replace").splitlines()
    raise AssertionError(f"vLLM not ready, exit code {process.poll()}: {Vllm().error_lines(lines, 10)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT_S)
