"""Engines that ask for a key of their own: every hop carries it, and no client's key gets there."""

from __future__ import annotations

from pathlib import Path

from dynctl.transport.keys import load_engine_key, save_engine_key
from tests.integration.frontend_harness import Engine, frontend, make_spec

COMPLETION = {"model": "m", "prompt": "hi", "max_tokens": 3}


async def test_engines_get_their_own_key_and_never_a_clients(tmp_path: Path) -> None:
    path = tmp_path / "engine.key"
    save_engine_key(path)
    engine = Engine()
    async with frontend(make_spec(engine_key_file=str(path)), aggregated=[engine]) as front:
        for body in (COMPLETION, {**COMPLETION, "stream": True}):
            answer = await front.post("/v1/completions", body, {"authorization": "Bearer clients-own"})
            assert answer.status == 200
        assert (await front.post("/tokenize", {"prompt": "x"})).status == 200
    sent = [pair for request in engine.requests for pair in request.headers if pair[0] == b"authorization"]
    assert sent == [(b"authorization", f"Bearer {load_engine_key(path)}".encode())] * 3


async def test_prefill_and_decode_both_get_it(tmp_path: Path) -> None:
    path = tmp_path / "engine.key"
    save_engine_key(path)
    prefill, decode = Engine(), Engine()
    roles = {"prefill": 1, "decode": 1}
    spec = make_spec(engine_key_file=str(path), backend="mocker", roles=roles)
    async with frontend(spec, prefill=[prefill], decode=[decode]) as front:
        await front.post("/v1/completions", COMPLETION, {"authorization": "Bearer clients-own"})
    expected = f"Bearer {load_engine_key(path)}".encode()
    assert [request.header(b"authorization") for request in prefill.requests][:1] == [expected]
    assert {request.header(b"authorization") for request in prefill.requests + decode.requests} == {expected}
