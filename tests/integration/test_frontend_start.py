"""When a frontend begins to listen: not before it knows whom to send requests to."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dynctl.errors import PeerLost
from dynctl.http.client import Origin
from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import DEADLINE_S, Engine
from tests.integration.frontend_plane import BLOCK, TOKENS, free_port, plane, two_engines

COMPLETION = {"model": "m", "prompt": "x"}


@pytest.fixture
async def engines() -> AsyncIterator[list[Engine]]:
    async with two_engines() as group:
        yield group


async def test_it_does_not_listen_before_it_knows_what_the_workers_hold(
    tmp_path: Path, engines: list[Engine]
) -> None:
    hashes = sequence_hashes(TOKENS, BLOCK, root_hash())
    async with plane(tmp_path) as deployment:
        holder = await deployment.join(0, engines[0], block_size=BLOCK)
        await deployment.join(1, engines[1], block_size=BLOCK)
        holder.store(hashes)
        holder.answers.clear()
        await deployment.start(deployment.spec(router=RouterSpec(mode="kv"), sync_timeout_s=60.0))
        await asyncio.wait_for(holder.asked.wait(), DEADLINE_S)
        with pytest.raises(PeerLost):
            await deployment.call("GET", "/live")
        assert deployment.member("frontend-0") is None
        holder.answers.set()
        await deployment.until(lambda response: response.status == 200)
        response = await deployment.call("POST", "/v1/completions", {"model": "m", "prompt": TOKENS})
        assert dict(response.headers)[b"x-dynctl-workers"] == b"aggregated-0"
        page = (await deployment.call("GET", "/metrics")).body
        assert b"dynctl_frontend_start_unsynced_ranks 0.0" in page


async def test_a_worker_that_does_not_tell_what_it_holds_is_not_waited_for_without_end(
    tmp_path: Path, engines: list[Engine]
) -> None:
    async with plane(tmp_path) as deployment:
        mute = await deployment.join(0, engines[0], block_size=BLOCK)
        mute.answers.clear()
        await deployment.start(deployment.spec(router=RouterSpec(mode="kv"), sync_timeout_s=0.2))
        health = await deployment.until(lambda response: response.status == 200)
        assert "aggregated-0 rank 0: its KV index is being synced" in json.loads(health.body)["doubts"][0]
        page = (await deployment.call("GET", "/metrics")).body
        assert b"dynctl_frontend_start_unsynced_ranks 1.0" in page
        assert (await deployment.call("POST", "/v1/completions", COMPLETION)).status == 200
        mute.answers.set()
        await deployment.until(lambda response: json.loads(response.body)["doubts"] == [])


async def test_one_of_several_does_not_listen_before_it_has_seen_the_membership(
    tmp_path: Path, engines: list[Engine]
) -> None:
    async with plane(tmp_path) as deployment:
        await deployment.join(0, engines[0])
        spec = deployment.spec(address="127.0.0.1", own_port=free_port(), events_port=free_port())
        deployment.speaks.clear()
        await deployment.start(spec, incarnation=1)
        await asyncio.wait_for(deployment.asked.wait(), DEADLINE_S * 2)
        await asyncio.sleep(1.2)  # longer than a frontend that is alone waits
        with pytest.raises(PeerLost):
            await deployment.call("GET", "/live")
        deployment.speaks.set()
        await deployment.until(lambda response: response.status == 200)
        deployment.origin = Origin("http", "127.0.0.1", spec.own_port)
        assert (await deployment.call("POST", "/v1/completions", COMPLETION)).status == 200
        await deployment.until(lambda _: deployment.member("frontend-0") is not None)
        member = deployment.member("frontend-0")
        assert member is not None
        assert member.instance.url == f"http://127.0.0.1:{spec.own_port}"
        assert member.instance.events == f"tcp://127.0.0.1:{spec.events_port}"


async def test_it_ends_when_told_to_while_it_still_waits(tmp_path: Path, engines: list[Engine]) -> None:
    async with plane(tmp_path) as deployment:
        mute = await deployment.join(0, engines[0], block_size=BLOCK)
        mute.answers.clear()
        await deployment.start(deployment.spec(router=RouterSpec(mode="kv"), sync_timeout_s=60.0))
        await asyncio.wait_for(mute.asked.wait(), DEADLINE_S)
        assert deployment.process is not None
        deployment.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(deployment.process.wait(), DEADLINE_S) == 0
