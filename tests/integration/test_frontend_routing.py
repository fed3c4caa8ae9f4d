"""What clients may say of where a request goes, and what they are told of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from dynctl.kv.hashing import root_hash, sequence_hashes
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.kv_events import LoadReport, Stored
from dynctl.protocol.specs import (
    AffinitySpec,
    BusySpec,
    ConditionalDisaggSpec,
    FrontendSpec,
    QueueSpec,
    RouterSpec,
)
from tests.integration.frontend_harness import Engine, Front, error_of, frontend, hangs, make_spec

PROMPT = list(range(8, 8 + 160))
COMPLETION: dict[str, Any] = {"model": "m", "prompt": PROMPT, "max_tokens": 4}
CARD = ModelCard(name="m", block_size=16)


def kv(**router: Any) -> FrontendSpec:
    return make_spec(model=CARD, router=RouterSpec(mode="kv", **router))


async def where(front: Front, headers: Mapping[str, str] | None = None, **fields: Any) -> str:
    response = await front.post("/v1/completions", {**COMPLETION, **fields}, headers)
    assert response.status == 200, response.body
    return dict(response.headers)[b"x-dynctl-workers"].decode()


async def test_worker_asked_for_gets_the_request() -> None:
    async with frontend(kv(), aggregated=[Engine(), Engine()]) as front:
        for name in ("aggregated-0", "aggregated-1"):
            for headers in ({"x-dynctl-worker": name}, {"x-dynamo-worker-instance-id": name}):
                assert await where(front, headers) == name
            assert await where(front, nvext={"backend_instance_id": name}) == name


async def test_nvext_does_not_reach_the_engine() -> None:
    engine = Engine()
    async with frontend(kv(), aggregated=[engine]) as front:
        await where(front, nvext={"agent_hints": {"priority": 1}})
    assert engine.bodies() == [COMPLETION]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
async def test_worker_without_events_is_believed_to_hold_what_it_answered(path: str, stream: bool) -> None:
    async with frontend(kv(), aggregated=[Engine() for _ in range(4)]) as front:
        body = {**COMPLETION, "stream": stream, "input": "words " * 200}
        workers = [dict((await front.post(path, body)).headers)[b"x-dynctl-workers"] for _ in range(12)]
        assert len(set(workers)) == 1


async def test_an_output_that_cannot_come_weighs_on_nobody() -> None:
    engine = Engine(hangs)
    async with frontend(kv(), aggregated=[engine]) as front:
        hint = {"agent_hints": {"osl": 10**15}}
        asked = asyncio.create_task(front.post("/v1/completions", {**COMPLETION, "nvext": hint}))
        await engine.wait(lambda: bool(engine.requests))
        assert [load.blocks for load in front.core.router.loads().values()] == [11]
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked


@pytest.mark.parametrize(
    ("headers", "status", "told"),
    [
        ({"x-dynctl-worker": "aggregated-7"}, 400, "there are: aggregated-0, aggregated-1"),
        ({"x-dynctl-rank": "3"}, 400, "there is no rank 3"),
        ({"x-dynctl-rank": "x"}, 400, "whole number"),
        ({"x-dynctl-worker": "aggregated-1"}, 503, "aggregated-1, is draining"),
    ],
)
async def test_worker_that_cannot_be_had_is_a_clear_error(
    headers: dict[str, str], status: int, told: str
) -> None:
    engine = Engine()
    async with frontend(kv(), aggregated=[engine]) as front:
        front.join("aggregated", 1, engine.url, state="draining")
        response = await front.post("/v1/completions", COMPLETION, headers)
        assert response.status == status
        assert told in error_of(response)["message"]
    assert engine.requests == []


async def test_dry_run_tells_the_choice_and_asks_no_engine() -> None:
    engines = [Engine(), Engine()]
    async with frontend(kv(), aggregated=engines) as front:
        held = sequence_hashes(PROMPT, 16, root_hash())[:6]
        front.core.router.members_changed([], [])
        front.core.router._index.apply(("aggregated-1", 0), Stored(held))
        for extra in ({"headers": {"x-dynctl-dry-run": "1"}}, {"nvext": ["query_instance_id"]}):
            body = {**COMPLETION, "stream": True}
            if "nvext" in extra:
                body["nvext"] = {"annotations": extra["nvext"]}
            headers = extra.get("headers")
            assert headers is None or isinstance(headers, dict)
            answer = await front.post("/v1/completions", body, headers)
            assert answer.status == 200
            assert [name for name, _ in answer.headers].count(b"x-request-id") == 1
            told = json.loads(answer.body)
            assert (told["worker"], told["rank"], told["overlap_blocks"]) == ("aggregated-1", 0, 6)
            assert (told["prompt_tokens"], told["prompt_blocks"], told["block_size"]) == (160, 10, 16)
            rows = told["roles"]["aggregated"]["candidates"]
            assert [row["worker"] for row in rows] == ["aggregated-0", "aggregated-1"]
            assert rows[0]["cost"] > rows[1]["cost"]
        assert {load.requests for load in front.core.router.loads().values()} == {0}
    assert [engine.requests for engine in engines] == [[], []]


async def test_dry_run_of_a_split_model_tells_both_workers() -> None:
    spec = make_spec(backend="vllm", roles={"prefill": 1, "decode": 1}, router=RouterSpec(mode="kv"))
    async with frontend(spec, prefill=[Engine()], decode=[Engine()]) as front:
        answer = await front.post("/v1/completions", COMPLETION, {"x-dynctl-dry-run": "true"})
        told = json.loads(answer.body)
        assert {role: place["worker"] for role, place in told["roles"].items()} == {
            "prefill": "prefill-0",
            "decode": "decode-0",
        }
        assert told["worker"] == "decode-0"


async def test_dry_run_without_workers_is_refused() -> None:
    async with frontend(kv(), aggregated=[]) as front:
        answer = await front.post("/v1/completions", COMPLETION, {"x-dynctl-dry-run": "true"})
        assert answer.status == 503


async def test_session_stays_and_its_end_frees_it() -> None:
    spec = make_spec(
        model=CARD, router=RouterSpec(mode="round_robin", session_affinity=AffinitySpec(mode="hard"))
    )
    async with frontend(spec, aggregated=[Engine(), Engine(), Engine()]) as front:
        session = {"x-dynctl-session-id": "s"}
        first = await where(front, session)
        assert {await where(front, session) for _ in range(3)} == {first}
        last = {**session, "x-dynctl-session-final": "true"}
        assert await where(front, last) == first
        assert len(front.core.router._sessions) == 0


async def test_decode_reads_the_prompt_it_holds_most_of() -> None:
    router = RouterSpec(mode="kv", conditional_disagg=ConditionalDisaggSpec(mode="isl"))
    spec = make_spec(backend="vllm", roles={"prefill": 1, "decode": 1}, router=router, model=CARD)
    prefill, decode = Engine(), Engine()
    async with frontend(spec, prefill=[prefill], decode=[decode]) as front:
        held = sequence_hashes(PROMPT, 16, root_hash())[:9]
        front.core.router._index.apply(("decode-0", 0), Stored(held))
        assert await where(front) == "decode-0"
        await front.idle()
        metrics = await front.metrics()
    assert prefill.requests == []
    assert decode.bodies() == [COMPLETION]
    assert "dynctl_frontend_router_prefill_skipped_total 1.0" in metrics


async def through(front: Front, **fields: Any) -> list[str]:
    """The roles that a dry run names."""
    answer = await front.post("/v1/completions", {**COMPLETION, **fields}, {"x-dynctl-dry-run": "1"})
    return list(json.loads(answer.body)["roles"])


async def test_a_dry_run_names_no_prefill_worker_where_none_would_be_asked() -> None:
    router = RouterSpec(mode="kv", conditional_disagg=ConditionalDisaggSpec(mode="isl"))
    spec = make_spec(backend="vllm", roles={"prefill": 1, "decode": 1}, router=router, model=CARD)
    async with frontend(spec, prefill=[Engine()], decode=[Engine()]) as front:
        assert await through(front) == ["prefill", "decode"]
        assert await through(front, n=2) == ["decode"]
        held = sequence_hashes(PROMPT, 16, root_hash())[:9]
        front.core.router._index.apply(("decode-0", 0), Stored(held))
        assert await through(front) == ["decode"]
        assert "router_prefill_skipped_total 0.0" in await front.metrics(), "nothing went anywhere"


async def test_a_prompt_does_not_wait_for_busy_prefill_workers_that_decode_may_spare_it() -> None:
    """Where requests wait for prefill workers, these never have so much to do that they are passed by."""
    router = RouterSpec(
        mode="kv", conditional_disagg=ConditionalDisaggSpec(mode="load"), queue=QueueSpec(limit=0)
    )
    spec = make_spec(
        backend="vllm",
        roles={"prefill": 1, "decode": 1},
        router=router,
        model=CARD,
        busy=BusySpec(decode_blocks=0.5),
    )
    prefill, decode = Engine(), Engine()
    async with frontend(spec, prefill=[prefill], decode=[decode]) as front:
        for worker, usage, status in (("prefill-0", 0.9, 200), ("decode-0", 0.9, 429)):
            report = LoadReport(worker, 1, 0, running=0, waiting=0, kv_usage=usage, kv_blocks=100)
            front.core.router.on_load(report)
            assert (await front.post("/v1/completions", COMPLETION)).status == status
        await front.idle()
        assert "router_prefill_skipped_total 1.0" in await front.metrics()
    assert prefill.requests == []
    assert decode.bodies() == [COMPLETION]


async def test_worker_without_events_shows_in_health_and_metrics() -> None:
    async with frontend(kv(), aggregated=[]) as front:
        front.join("aggregated", 0, "http://127.0.0.1:9", kv_events=False)
        health = json.loads((await front.call("GET", "/health")).body)
        assert health["doubts"] == ["aggregated-0: it publishes no KV events: what it has cached is guessed"]
        assert 'router_kv_guessed{worker="aggregated-0"} 1.0' in await front.metrics()
        front.join(
            "aggregated", 0, "http://127.0.0.1:9", incarnation=2, kv_events=True, events="e", control="c"
        )
        assert 'router_kv_guessed{worker="aggregated-0"} 0.0' in await front.metrics()


async def test_prompts_that_begin_alike_have_one_home_in_mode_consistent_hash() -> None:
    engines = [Engine() for _ in range(4)]
    async with frontend(make_spec(router=RouterSpec(mode="consistent_hash")), aggregated=engines) as front:
        homes = set()
        for beginning in range(8):
            texts = [f"{beginning} " * 40 + end for end in ("a", "b", "c")]
            at = {await where(front, prompt=text) for text in texts}
            assert len(at) == 1
            homes |= at
        assert len(homes) > 1
