"""A frontend as in a deployment; in place of the rest a registry, and sidecars that tell of KV events.

    python -m tests.perf.stand_in --frontend MODE PORT BATCHES BLOCKS ENGINE_URL...

The process becomes `python -m dynctl.frontend`; what stands in for the rest is a process beside it that ends
with it. Every sidecar holds `HELD` blocks, and of the beginnings that prompts share its part; together, and
all at once, they send `BATCHES` messages a second of blocks that came and went, `BLOCKS` each way a second:
as many as the load's prompts and answers fill.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

import dynctl.mocker
from dynctl.discovery.registry import Registry
from dynctl.errors import UsageError
from dynctl.frontend.body import Body
from dynctl.frontend.prompt.preprocess import Preprocessor
from dynctl.http.runtime import run
from dynctl.observability.metrics import Metrics
from dynctl.protocol.instances import Instance, ModelCard
from dynctl.protocol.kv_events import KV_TOPIC, KvBatch, KvSync, KvSyncReply, Removed, Stored
from dynctl.protocol.registry import Register, Renew
from dynctl.protocol.specs import FrontendSpec, RouterSpec
from dynctl.transport.control import ControlServer, read_body
from dynctl.transport.event_plane import Publisher
from dynctl.transport.keys import Keys
from dynctl.worker.kv_relay import GATHER_S, until_told
from tests.perf.load import shared_texts

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
BLOCK = 16
MODEL = ModelCard(name="tiny", path=str(ASSETS), block_size=BLOCK)
ANY_PORT = "tcp://127.0.0.1:0"
HELD = 50_000
RENEWED_S = 1.0


async def shared_hashes() -> list[list[int]]:
    """The blocks of each beginning that prompts share."""
    preprocessor = Preprocessor(MODEL, Metrics())
    found = []
    for shape in ("shared", "huge"):
        for begin in shared_texts(shape):
            data = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": begin}]}).encode()
            facts = await preprocessor.prepare("chat", Body.parse(data), BLOCK)
            found.append(list(facts.hashes or ()))
    preprocessor.close()
    return found


class Sidecar:
    """Tells what one worker holds."""

    def __init__(self, keys: Keys, index: int, held: list[int]) -> None:
        self.id = f"aggregated-{index}"
        self.held = held
        self.seq = 0
        self.publisher = Publisher(keys, ANY_PORT)
        self.events = self.publisher.start()
        self.control = ControlServer(keys, ANY_PORT, self.answer)
        self.endpoint = self.control.start()

    async def answer(self, op: str, body: msgspec.Raw) -> msgspec.Struct:
        """What it holds, whole."""
        if op != "kv.sync":
            raise UsageError(f"unknown op {op!r}", where=self.id, hint="kv.sync")
        asked = read_body(body, KvSync)
        return KvSyncReply(
            incarnation=1,
            rank=asked.rank,
            next_seq=self.seq,
            snapshot=[Stored(self.held)],
            block_size=BLOCK,
        )

    def tell(self, rng: random.Random, changed: int) -> None:
        """So many blocks come as go."""
        new = [rng.getrandbits(64) for _ in range(changed)]
        events: list[Any] = [Stored(new), Removed(self.held[-changed:])]
        self.held[-changed:] = new
        self.publisher.publish(KV_TOPIC, KvBatch(self.id, 1, 0, self.seq, events, BLOCK))
        self.seq += 1

    def instance(self, url: str) -> Instance:
        """As it registers."""
        return Instance(
            id=self.id,
            incarnation=1,
            role="aggregated",
            index=int(self.id.rpartition("-")[2]),
            node="n",
            pid=1,
            started_at=time.time(),
            url=url,
            model=MODEL,
            events=self.events,
            control=self.endpoint,
        )


async def keep(registry: Registry, workers: list[str]) -> None:
    """Renew the workers' leases, as their sidecars do."""
    while True:
        for worker in workers:
            renew = msgspec.Raw(msgspec.msgpack.encode(Renew(id=worker, incarnation=1)))
            await registry.handle("registry.renew", renew)
        await asyncio.sleep(RENEWED_S)


async def beside(folder: Path, batches: float, blocks: float, engines: list[str]) -> None:
    """A registry that knows the workers, and their sidecars; prints its endpoints, ends with its parent."""
    keys = Keys.load(folder / "keys.json")
    publisher = Publisher(keys, ANY_PORT)
    membership = publisher.start()
    there = Registry(publisher)
    control = ControlServer(keys, ANY_PORT, there.handle)
    endpoint = control.start()
    there.start()
    rng = random.Random(0)
    shared = await shared_hashes()
    sidecars = []
    for index, url in enumerate(engines):
        mine = list(itertools.chain.from_iterable(shared[index % 4 :: 4]))
        one = Sidecar(keys, index, mine + [rng.getrandbits(64) for _ in range(HELD)])
        sidecars.append(one)
        register = msgspec.Raw(msgspec.msgpack.encode(Register(instance=one.instance(url))))
        await there.handle("registry.register", register)
    keeping = asyncio.create_task(keep(there, [one.id for one in sidecars]))
    print(endpoint, membership, flush=True)
    parent = os.getppid()
    rounds = max(1.0, len(sidecars) / batches / GATHER_S)
    while os.getppid() == parent:
        await asyncio.sleep((rounds - 1) * GATHER_S)
        await asyncio.sleep(until_told(time.time()))
        for one in sidecars:
            one.tell(rng, max(1, round(blocks / batches)))
    keeping.cancel()


def become_frontend(mode: str, port: int, told: list[str], engines: list[str]) -> None:
    """Start what stands beside, then turn this very process into a frontend: its CPU is read by its pid.

    `told`: batches and blocks a second.
    """
    folder = Path(tempfile.mkdtemp(prefix="perf-stand-in-"))
    Keys.generate().save(folder / "keys.json")
    argv = [sys.executable, "-m", "tests.perf.stand_in", "--beside", str(folder), *told, *engines]
    other = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    endpoint, membership = other.stdout.readline().split()
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
        roles={"aggregated": len(engines)},
        router=RouterSpec(mode=mode),
    )
    path = folder / "frontend-0.json"
    path.write_bytes(msgspec.json.encode(spec))
    env = {**os.environ, "DYNCTL_LOG_LEVEL": "WARNING"}
    os.execve(sys.executable, [sys.executable, "-m", "dynctl.frontend", "--spec", str(path)], env)


if __name__ == "__main__":
    if sys.argv[1] == "--beside":
        run(beside(Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]), sys.argv[5:]))
    else:
        become_frontend(sys.argv[2], int(sys.argv[3]), sys.argv[4:6], sys.argv[6:])
