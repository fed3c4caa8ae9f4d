"""An event plane that loses, delays, doubles, reorders: routing comes right again and says what happened."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random

import pytest

from dynctl.http.client import Response
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.registry import Leave, Register
from dynctl.protocol.specs import RouterSpec
from tests.deployment import counter
from tests.integration.faulty_plane import FaultyPlane
from tests.integration.frontend_harness import Engine
from tests.integration.frontend_plane import BLOCK, TOKENS, Plane, Sidecar, plane, two_engines

KV = RouterSpec(mode="kv")
PREFIX = "dynctl_frontend_"


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with two_engines() as group:
        yield group


@asynccontextmanager
async def faulty(deployment: Plane, faults: float) -> AsyncIterator[FaultyPlane]:
    """Closed before the frontend is, as a broken network would be."""
    bad = FaultyPlane(deployment.keys, seed=5, faults=faults)
    try:
        yield bad
    finally:
        bad.close()


async def metrics(deployment: Plane) -> str:
    return (await deployment.call("GET", "/metrics")).body.decode()


async def doubts(deployment: Plane) -> list[str]:
    found: list[str] = json.loads((await deployment.call("GET", "/health")).body)["doubts"]
    return found


async def routed_to(deployment: Plane) -> str:
    """The worker that the prompt of TOKENS goes to."""
    response = await deployment.call("POST", "/v1/completions", {"model": "m", "prompt": TOKENS})
    assert response.status == 200
    return dict(response.headers)[b"x-dynctl-workers"].decode()


def shows(text: str, response: Response) -> bool:
    return text.encode() in response.body


def has_ready(workers: int, response: Response) -> bool:
    found: bool = json.loads(response.body)["roles"]["aggregated"]["ready"] == workers
    return found


async def churn(sidecar: Sidecar, rng: Random, steps: int) -> None:
    """Store and remove blocks, a burst every few milliseconds."""
    for step in range(steps):
        if rng.random() < 0.7 or not sidecar.held:
            sidecar.store([rng.getrandbits(60) for _ in range(3)])
        else:
            sidecar.remove(rng.sample(sorted(sidecar.held), 1))
        if step % 5 == 0:
            await asyncio.sleep(0.005)


async def test_the_index_is_true_after_lost_late_doubled_and_reordered_events(
    tmp_path: Path, engines: list[Engine]
) -> None:
    hashes = sequence_hashes(TOKENS, BLOCK, root_hash())
    async with plane(tmp_path) as deployment, faulty(deployment, 0.1) as bad:
        sidecars = [await deployment.join(i, engines[i], bad.through, block_size=BLOCK) for i in (0, 1)]
        sidecars[0].keeps = 3
        await deployment.start(deployment.spec(router=KV))
        await deployment.until(lambda response: response.status == 200)
        rngs = [Random(1), Random(2)]
        await asyncio.gather(*(churn(s, r, 600) for s, r in zip(sidecars, rngs, strict=True)))
        sidecars[1].store(hashes)
        await asyncio.gather(*(churn(s, r, 600) for s, r in zip(sidecars, rngs, strict=True)))
        sidecars[1].store(hashes)
        await asyncio.sleep(0.1)
        bad.faults = 0.0
        for sidecar in sidecars:
            sidecar.beat()
        for index, sidecar in enumerate(sidecars):
            told = f'{PREFIX}router_kv_blocks{{rank="0",worker="aggregated-{index}"}} {len(sidecar.held)}.0'
            await deployment.until(partial(shows, told), "/metrics")
        assert await doubts(deployment) == []
        assert {await routed_to(deployment) for _ in range(5)} == {"aggregated-1"}
        page = await metrics(deployment)
    gaps, reloads = (counter(page, f"{PREFIX}router_kv_{name}_total") for name in ("gaps", "reloads"))
    sys.stdout.write(f"\nevents {dict(bad.counts)}: {gaps:.0f} gaps, {reloads:.0f} snapshots taken\n")
    assert bad.counts["came"] >= 2400
    assert gaps > 20
    assert 0 < reloads < gaps
    assert counter(page, f"{PREFIX}router_kv_reloads_total", worker="aggregated-1") == 0, "replay was enough"


async def test_a_gap_that_cannot_be_filled_is_told_until_it_is(tmp_path: Path, engines: list[Engine]) -> None:
    hashes = sequence_hashes(TOKENS, BLOCK, root_hash())
    async with plane(tmp_path) as deployment, faulty(deployment, 0.0) as bad:
        holder = await deployment.join(0, engines[0], bad.through, block_size=BLOCK)
        await deployment.join(1, engines[1], block_size=BLOCK)
        await deployment.start(deployment.spec(router=KV))
        await deployment.until(lambda response: response.status == 200)
        holder.store([1])
        await deployment.until(lambda response: b'worker="aggregated-0"} 1.0' in response.body, "/metrics")
        holder.answers.clear()
        bad.faults = 1.0
        holder.store(hashes[:5])
        await asyncio.sleep(0.1)
        bad.faults = 0.0
        holder.store(hashes[5:])
        await deployment.until(lambda response: json.loads(response.body)["doubts"] != [])
        (doubt,) = await doubts(deployment)
        assert doubt == "aggregated-0 rank 0: its KV index is being synced (1 batches wait)"
        page = await metrics(deployment)
        assert counter(page, f"{PREFIX}router_kv_synced") == 1
        assert counter(page, f"{PREFIX}router_kv_gaps_total", worker="aggregated-0") == 1
        # Another prompt than the one asked for below: its place would be remembered.
        other = {"model": "m", "prompt": TOKENS[::-1]}
        assert (await deployment.call("POST", "/v1/completions", other)).status == 200
        holder.answers.set()
        await deployment.until(lambda response: json.loads(response.body)["doubts"] == [])
        assert await routed_to(deployment) == "aggregated-0"


async def test_the_membership_is_right_after_lost_late_doubled_and_reordered_changes(
    tmp_path: Path, engines: list[Engine]
) -> None:
    async with plane(tmp_path) as deployment, faulty(deployment, 0.2) as bad:
        await deployment.join(0, engines[0])
        spec = deployment.spec(membership=bad.through(deployment.membership))
        await deployment.start(spec)
        await deployment.until(lambda response: response.status == 200)
        comes = await deployment.join(1, engines[1])
        for _ in range(60):
            await deployment.tell("registry.leave", Leave(id=comes.instance.id, incarnation=1))
            await asyncio.sleep(0.01)
            await deployment.tell("registry.register", Register(instance=comes.instance))
            await asyncio.sleep(0.01)
        await deployment.until(partial(has_ready, 2))
        await deployment.tell("registry.leave", Leave(id=comes.instance.id, incarnation=1))
        await deployment.until(partial(has_ready, 1))
        assert await routed_to(deployment) == "aggregated-0"
    sys.stdout.write(f"\nmembership {dict(bad.counts)}\n")
    assert bad.counts["dropped"] > 10
