"""CPU a frontend process spends per relayed token, against HAProxy's: `relay_cpu` with real frontends in it.

    python -m tests.perf.frontend_relay [--modes least_loaded,kv] [options of relay_cpu]

A frontend is started as in a deployment: `python -m dynctl.frontend` on its spec, the engine made known to it
by a registry that runs beside it in a process of its own. `kv` mode has the mocker's tokenizer and template.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

import dynctl.mocker
from dynctl.discovery.registry import Registry
from dynctl.http.runtime import run
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.registry import Register
from dynctl.protocol.specs import FrontendSpec, RouterSpec
from dynctl.transport.control import ControlServer
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from tests.perf import relay_cpu

ASSETS = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
MODEL = ModelCard(name="tiny", path=str(ASSETS), block_size=16)
ANY_PORT = "tcp://127.0.0.1:0"


async def registry(folder: Path, engine: int) -> None:
    """A registry that knows one worker; prints its endpoints, ends with its parent."""
    keys = Keys.load(folder / "keys.json")
    publisher = Publisher(keys, ANY_PORT)
    membership = publisher.start()
    there = Registry(publisher, ttl_s=36_000.0)
    control = ControlServer(keys, ANY_PORT, there.handle)
    endpoint = control.start()
    there.start()
    worker = Instance(
        id="aggregated-0",
        incarnation=1,
        role="aggregated",
        index=0,
        node="n",
        pid=1,
        started_at=time.time(),
        url=f"http://127.0.0.1:{engine}",
        model=MODEL,
    )
    await there.handle("registry.register", msgspec.Raw(msgspec.msgpack.encode(Register(instance=worker))))
    print(endpoint, membership, flush=True)
    parent = os.getppid()
    while os.getppid() == parent:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.5)


def become_frontend(mode: str, port: int, engine: int) -> None:
    """Start a registry, then turn this very process into a frontend, so that its CPU can be read by pid."""
    folder = Path(tempfile.mkdtemp(prefix="frontend-relay-"))
    Keys.generate().save(folder / "keys.json")
    argv = [sys.executable, "-m", "tests.perf.frontend_relay", "--as-registry", str(folder), str(engine)]
    beside = subprocess.Popen(argv, cwd=relay_cpu.ROOT, stdout=subprocess.PIPE, text=True)
    assert beside.stdout is not None
    endpoint, membership = beside.stdout.readline().split()
    spec = FrontendSpec(
        id="frontend-0",
        index=0,
        node="n",
        host="127.0.0.1",
        port=port,
        registry=endpoint,
        membership=membership,
        keys_file=str(folder / "keys.json"),
        backend="external",
        model=MODEL,
        roles={"aggregated": 1},
        router=RouterSpec(mode=mode),
    )
    path = folder / "frontend-0.json"
    path.write_bytes(msgspec.json.encode(spec))
    env = {**os.environ, "DYNCTL_LOG_LEVEL": "WARNING"}
    os.execve(sys.executable, [sys.executable, "-m", "dynctl.frontend", "--spec", str(path)], env)


def main() -> None:
    """Act as the comparison, or as one of its processes."""
    if sys.argv[1:2] == ["--as-registry"]:
        run(registry(Path(sys.argv[2]), int(sys.argv[3])))
        return
    if sys.argv[1:2] == ["--as-frontend"]:
        become_frontend(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    parser = argparse.ArgumentParser(description="CPU per relayed token of frontends, against HAProxy")
    parser.add_argument("--modes", default="least_loaded,kv")
    known, rest = parser.parse_known_args()
    proxies = []
    for mode in known.modes.split(","):
        command = f"{sys.executable} -m tests.perf.frontend_relay --as-frontend {mode} {{port}} {{engine}}"
        proxies += ["--proxy", f"{mode}={command}"]
    sys.argv = [sys.argv[0], *proxies, *rest]
    relay_cpu.main()


if __name__ == "__main__":
    main()
