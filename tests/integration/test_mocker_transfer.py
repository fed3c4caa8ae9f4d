"""Prefill and decode apart: the hand-over works, and everything that breaks its contract is caught."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from dynctl.engines.vllm_disagg import NixlPull
from tests.integration.mocker_process import MockerProcess, mocker, text_of

COMPLETIONS = "/v1/completions"
REQUEST: dict[str, Any] = {"prompt": list(range(100, 140)), "max_tokens": 12}
VIOLATIONS = "dynctl_mocker_transfer_violations_total"


def transfer(role: str, lease_s: float = 30) -> tuple[str, str]:
    config = {
        "kv_connector": "NixlConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"kv_lease_duration": lease_s},
    }
    return "--kv-transfer-config", json.dumps(config)


@asynccontextmanager
async def pair(lease_s: float = 30, *flags: str) -> AsyncIterator[tuple[MockerProcess, MockerProcess]]:
    common = ("--speedup", "0", "--served-model-name", "m", *flags)
    async with (
        mocker(*common, *transfer("kv_producer", lease_s)) as prefill,
        mocker(*common, *transfer("kv_consumer", lease_s)) as decode,
    ):
        yield prefill, decode


async def prefilled(prefill: MockerProcess, request: dict[str, Any] = REQUEST) -> dict[str, Any]:
    """The parameters of a prefill, by the contract that dynctl speaks to real engines."""
    answer = await prefill.post(COMPLETIONS, NixlPull().prefill_body(request, {}))
    return NixlPull().handoff(answer, 0.0).params


def with_params(params: dict[str, Any], request: dict[str, Any] = REQUEST) -> dict[str, Any]:
    return {**request, "kv_transfer_params": params}


async def refused(decode: MockerProcess, params: dict[str, Any], **request: Any) -> str:
    """The words of a 500."""
    response = await decode.call("POST", COMPLETIONS, with_params(params, {**REQUEST, **request}))
    assert response.status == 500
    error = json.loads(response.body)["error"]
    assert error["type"] == "InternalServerError"
    return str(error["message"])


async def test_decode_says_what_one_engine_alone_says_and_computes_no_prompt_token() -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        assert params["remote_num_tokens"] == 40
        assert len(params["remote_block_ids"][0]) == 3
        assert (await prefill.get("/mock/state"))["ranks"][0]["pinned"] == 1
        apart = await decode.post(COMPLETIONS, with_params(params))
        alone = await prefill.post(COMPLETIONS, REQUEST)
        assert apart["choices"][0]["text"] == alone["choices"][0]["text"]
        state = await prefill.until(lambda state: not state["pinned"])
        assert state["free_blocks"] == state["blocks"]
        source = "vllm:prompt_tokens_by_source_total"
        assert await decode.metric(source, source="external_kv_transfer") == 40
        assert await decode.metric(source, source="local_compute") == 0
        assert (await decode.get("/mock/state"))["ranks"][0]["cached"]
        assert await decode.metric(VIOLATIONS) == await prefill.metric(VIOLATIONS) == 0


async def test_a_streamed_chat_goes_over_two_engines() -> None:
    async with pair() as (prefill, decode):
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
        answer = await prefill.post("/v1/chat/completions", NixlPull().prefill_body(chat, {}))
        params = NixlPull().handoff(answer, 0.0).params
        events = await decode.events("/v1/chat/completions", with_params(params, chat))
        alone = await prefill.post("/v1/chat/completions", chat)
        assert text_of(events) == alone["choices"][0]["message"]["content"]


async def test_a_prompt_decode_has_already_is_not_moved_and_still_freed_on_prefill() -> None:
    async with pair() as (prefill, decode):
        for _ in range(2):
            await decode.post(COMPLETIONS, with_params(await prefilled(prefill)))
            await prefill.until(lambda state: not state["pinned"])
        assert await decode.metric("vllm:external_prefix_cache_hits_total") == 40 + 8


async def test_parameters_used_twice_are_refused_and_counted_on_both_sides() -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        await decode.post(COMPLETIONS, with_params(params))
        assert "one use" in await refused(decode, params)
        for side in (prefill, decode):
            assert await side.metric(VIOLATIONS, reason="reused") == 1
        await decode.post(COMPLETIONS, REQUEST)


async def test_parameters_for_another_prompt_are_refused() -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        assert "another prompt" in await refused(decode, params, prompt=list(range(41)))
        assert await prefill.metric(VIOLATIONS, reason="prompt") == 1


async def test_parameters_after_the_lease_are_refused_and_prefill_counts_it() -> None:
    async with pair(0.2) as (prefill, decode):
        params = await prefilled(prefill)
        state = await prefill.until(lambda state: not state["pinned"])
        assert state["free_blocks"] == state["blocks"]
        assert "lease has ended" in await refused(decode, params)
        assert await prefill.metric("vllm:nixl_num_kv_expired_reqs_total") == 1
        assert await decode.metric(VIOLATIONS, reason="expired") == 1


@pytest.mark.parametrize("missing", ["remote_engine_id", "remote_port", "tp_size", "remote_block_ids"])
async def test_incomplete_parameters_are_refused(missing: str) -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        del params[missing]
        assert missing in await refused(decode, params)
        assert await decode.metric(VIOLATIONS, reason="incomplete") == 1


async def test_a_killed_prefill_fails_the_decode_and_nothing_else() -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        prefill.process.send_signal(signal.SIGKILL)
        await prefill.exit_code()
        assert "unreachable" in await refused(decode, params)
        events = await decode.events(COMPLETIONS, with_params(params))
        assert events[-1]["error"]["code"] == 500
        assert (await decode.post(COMPLETIONS, REQUEST))["usage"]["completion_tokens"] == 12
        state = await decode.until(lambda state: not state["receiving"])
        assert state["free_blocks"] == state["blocks"]


async def test_a_prefill_that_was_replaced_is_not_taken_for_the_old_one() -> None:
    async with pair() as (prefill, decode):
        params = {**await prefilled(prefill), "remote_engine_id": "another"}
        assert "was replaced" in await refused(decode, params)
        assert await prefill.metric(VIOLATIONS, reason="engine") == 1


async def test_engines_that_do_not_match_refuse_each_other() -> None:
    async with pair() as (prefill, _):
        flags = ("--speedup", "0", "--served-model-name", "m", "--block-size", "32")
        async with mocker(*flags, *transfer("kv_consumer")) as other:
            assert "blocks of 32" in await refused(other, await prefilled(prefill))


async def test_a_request_refused_on_decode_frees_prefill_at_once() -> None:
    async with pair() as (prefill, decode):
        params = await prefilled(prefill)
        bad = with_params(params, {**REQUEST, "n": 0})
        assert (await decode.call("POST", COMPLETIONS, bad)).status == 400
        await prefill.until(lambda state: not state["pinned"])
        assert (
            await decode.call("POST", COMPLETIONS, with_params(params, {**REQUEST, "n": 2}))
        ).status == 400


async def test_a_request_that_waits_on_decode_keeps_the_lease_alive() -> None:
    flags = ("--max-num-seqs", "1", "--speedup", "1")
    async with (
        mocker("--speedup", "0", "--served-model-name", "m", *transfer("kv_producer", 1.5)) as prefill,
        mocker("--served-model-name", "m", *flags, *transfer("kv_consumer", 1.5)) as decode,
    ):
        blocker = await decode.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 8000})
        params = await prefilled(prefill)
        waiting = asyncio.create_task(decode.post(COMPLETIONS, with_params(params)))
        await decode.until(lambda state: state["waiting"] == 1)
        await asyncio.sleep(2.5)  # longer than the lease: this is what is tested
        assert (await prefill.get("/mock/state"))["ranks"][0]["pinned"] == 1
        blocker.abort()
        assert (await waiting)["usage"]["completion_tokens"] == 12


async def test_a_client_that_leaves_while_waiting_on_decode_frees_prefill() -> None:
    async with pair(30, "--max-num-seqs", "1") as (prefill, _):
        flags = ("--served-model-name", "m", "--max-num-seqs", "1")
        async with mocker(*flags, *transfer("kv_consumer")) as decode:
            blocker = await decode.open(COMPLETIONS, {"prompt": [5, 6], "max_tokens": 8000})
            stream = await decode.open(COMPLETIONS, with_params(await prefilled(prefill)))
            await decode.until(lambda state: state["waiting"] == 1)
            stream.abort()
            await prefill.until(lambda state: not state["pinned"])
            blocker.abort()


async def test_an_engine_without_a_transfer_role_ignores_the_parameters() -> None:
    async with mocker("--speedup", "0") as alone:
        answer = await alone.post(COMPLETIONS, NixlPull().prefill_body(REQUEST, {}))
        assert answer["kv_transfer_params"] is None
        params = {"do_remote_prefill": True}
        assert (await alone.post(COMPLETIONS, with_params(params)))["usage"]["completion_tokens"] == 12
