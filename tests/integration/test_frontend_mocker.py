"""The frontend before real mocker processes: tokens as the engine counts them, the same text any way."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import dynctl.mocker
from dynctl.errors import PeerLost
from dynctl.http.client import Client, Origin
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import DEADLINE_S, Front, frontend, make_spec
from tests.integration.frontend_plane import free_port

ASSETS = Path(dynctl.mocker.__file__).parent / "assets" / "tiny"
CARD = ModelCard(name="m", path=str(ASSETS), block_size=16)
CHAT = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": [{"type": "text", "text": "Tell me of ZeroMQ, façade & naïveté."}]},
    ],
    "max_tokens": 12,
}
COMPLETION = {"model": "m", "prompt": "Once upon a time there was a router. " * 20, "max_tokens": 12}


@asynccontextmanager
async def mocker(kv_role: str = "") -> AsyncIterator[str]:
    """A mocker process that is ready; gives its URL."""
    port = free_port()
    argv = [sys.executable, "-m", "dynctl.mocker", "--port", str(port), "--served-model-name", "m"]
    argv += ["--speedup", "1000"]
    if kv_role:
        config = {"kv_connector": "NixlConnector", "kv_role": kv_role}
        argv += ["--kv-transfer-config", json.dumps(config)]
    process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.DEVNULL)
    client = Client()
    try:
        async with asyncio.timeout(DEADLINE_S * 2):
            while True:
                assert process.returncode is None
                try:
                    origin = Origin("http", "127.0.0.1", port)
                    if (await client.request(origin, "GET", "/health", timeout_s=2)).status == 200:
                        break
                except PeerLost:
                    pass  # it does not listen yet
                await asyncio.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        await client.close()
        process.kill()
        await process.wait()


@asynccontextmanager
async def deployment(*roles: str) -> AsyncIterator[Front]:
    """A frontend in kv mode over one mocker per role."""
    spec = make_spec(
        backend="mocker", model=CARD, roles=dict.fromkeys(roles, 1), router=RouterSpec(mode="kv")
    )
    kv_roles = {"prefill": "kv_producer", "decode": "kv_consumer", "aggregated": ""}
    async with AsyncExitStack() as stack:
        urls = [(role, await stack.enter_async_context(mocker(kv_roles[role]))) for role in roles]
        front = await stack.enter_async_context(frontend(spec))
        for role, url in urls:
            front.join(role, 0, url, model=CARD)  # type: ignore[arg-type]
        yield front


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
async def test_the_frontend_counts_the_prompt_as_the_engine_does(path: str, body: dict[str, Any]) -> None:
    async with deployment("aggregated") as front:
        response = await front.post(path, body)
        usage = json.loads(response.body)["usage"]
        text = await front.metrics()
    counted = re.search(r"input_sequence_tokens_sum\S* (\S+)", text)
    assert counted is not None
    assert float(counted.group(1)) == usage["prompt_tokens"]
    assert "tokenize_fallbacks_total" not in text


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
async def test_prefill_and_decode_apart_give_the_text_of_one_worker(path: str, body: dict[str, Any]) -> None:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with deployment("aggregated") as front:
        whole = json.loads((await front.post(path, body)).body)
    async with deployment("prefill", "decode") as front:
        apart = await front.post(path, body)
        assert dict(apart.headers)[b"x-dynctl-workers"] == b"prefill-0,decode-0"
        assert content(json.loads(apart.body)) == content(whole)
        events = (await front.post(path, streamed)).body.decode().strip().split("\n\n")
    assert events.pop() == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(content(chunk) for chunk in chunks) == content(whole)
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def content(answer: dict[str, Any]) -> str:
    """The text of an answer or of one event."""
    if not answer["choices"]:
        return ""
    choice = answer["choices"][0]
    told = choice.get("message") or choice.get("delta") or choice
    return str(told.get("content") or told.get("text") or "")
