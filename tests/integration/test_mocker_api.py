"""The mocker's HTTP face, as clients of vLLM know it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.mocker_process import MockerProcess, mocker, text_of

HELLO = [{"role": "user", "content": "hello there"}]
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture
async def fast() -> AsyncIterator[MockerProcess]:
    async with mocker("--speedup", "0", "--served-model-name", "m") as found:
        yield found


async def test_a_chat_says_the_same_streamed_and_whole(fast: MockerProcess) -> None:
    body = {"messages": HELLO, "max_tokens": 12}
    whole = await fast.post(CHAT, body)
    events = await fast.events(CHAT, {**body, "stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert whole["choices"][0]["message"]["content"] == text_of(events)
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert whole["object"] == "chat.completion"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1


async def test_a_repeated_prompt_is_counted_as_cached(fast: MockerProcess) -> None:
    body = {"prompt": list(range(100, 150)), "max_tokens": 1}
    cached = [
        (await fast.post(COMPLETIONS, body))["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached == [0, 48]
    assert await fast.metric("vllm:prefix_cache_hits_total") == 48
    assert await fast.metric("vllm:prefix_cache_queries_total") == 100
    labels = {"block_size": "16", "num_gpu_blocks": "4096", "model_name": "m", "engine": "0"}
    assert await fast.metric("vllm:cache_config_info", **labels) == 1


async def test_an_answer_cut_short_is_continued_by_its_text_and_by_its_tokens(fast: MockerProcess) -> None:
    whole = await fast.post(CHAT, {"messages": HELLO, "max_tokens": 20})
    part = await fast.post(CHAT, {"messages": HELLO, "max_tokens": 8})
    said = part["choices"][0]["message"]["content"]
    rest = await fast.post(
        CHAT,
        {
            "messages": [*HELLO, {"role": "assistant", "content": said}],
            "max_tokens": 12,
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    )
    assert said + rest["choices"][0]["message"]["content"] == whole["choices"][0]["message"]["content"]

    prompt = [11, 12, 13]
    events = await fast.events(COMPLETIONS, {"prompt": prompt, "max_tokens": 9, "return_token_ids": True})
    tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
    assert events[0]["choices"][0]["prompt_token_ids"] == prompt
    again = await fast.post(
        COMPLETIONS, {"prompt": prompt + tokens[:4], "max_tokens": 5, "return_token_ids": True}
    )
    assert again["choices"][0]["token_ids"] == tokens[4:]


async def test_several_prompts_and_choices_come_in_order(fast: MockerProcess) -> None:
    body = {"prompt": [[20, 21], [30, 31]], "max_tokens": 3, "n": 2}
    whole = await fast.post(COMPLETIONS, body)
    texts = [choice["text"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert whole["usage"]["prompt_tokens"] == 4
    assert whole["usage"]["completion_tokens"] == 12
    events = await fast.events(COMPLETIONS, body)
    assert [text_of(events, index) for index in range(4)] == texts


async def test_a_stop_string_ends_the_answer_and_frees_the_sequence(fast: MockerProcess) -> None:
    whole = await fast.post(CHAT, {"messages": HELLO, "max_tokens": 30})
    words = whole["choices"][0]["message"]["content"].split(" ")
    stop = f" {words[5]} {words[6][:1]}"
    for stream in (False, True):
        body = {"messages": HELLO, "max_tokens": 30, "stop": [stop, "never"]}
        if stream:
            events = await fast.events(CHAT, body)
            text, reason = text_of(events), events[-1]["choices"][0]["finish_reason"]
        else:
            (choice,) = (await fast.post(CHAT, body))["choices"]
            text, reason = choice["message"]["content"], choice["finish_reason"]
        assert (text, reason) == (" ".join(words[:5]), "stop")
    assert (await fast.until(lambda state: not state["running"]))["free_blocks"] == 4096
    assert await fast.metric("vllm:request_success_total", finished_reason="stop") == 2


async def test_answers_may_end_by_themselves() -> None:
    async with mocker("--speedup", "0", "--mean-output-tokens", "5") as found:
        body: dict[str, Any] = {"messages": HELLO, "max_tokens": 2000}
        whole = await found.post(CHAT, body)
        assert whole["choices"][0]["finish_reason"] == "stop"
        assert whole["usage"]["completion_tokens"] < 2000
        body["max_tokens"] = 200
        ignored = await found.post(CHAT, {**body, "ignore_eos": True})
        assert ignored["usage"]["completion_tokens"] == 200
        at_least = await found.post(CHAT, {**body, "min_tokens": 150})
        assert 150 <= at_least["usage"]["completion_tokens"] <= 200


async def test_a_client_that_leaves_frees_its_sequence() -> None:
    async with mocker("--speedup", "1") as found:
        stream = await found.open(CHAT, {"messages": HELLO, "max_tokens": 8000})
        await found.until(lambda state: state["running"] == 1)
        stream.abort()
        state = await found.until(lambda state: state["running"] == 0)
        assert state["free_blocks"] == state["blocks"]
        assert await found.metric("vllm:request_success_total", finished_reason="abort") == 1


async def test_requests_share_the_batch_and_take_the_profiles_time() -> None:
    async with mocker("--speedup", "20") as found:
        loop = asyncio.get_running_loop()
        began = loop.time()
        body = {"messages": HELLO, "max_tokens": 200}
        await asyncio.gather(*(found.post(CHAT, body) for _ in range(8)))
        assert loop.time() - began >= 200 * 0.006 / 20 * 0.9
        assert await found.metric("vllm:generation_tokens_total") == 1600
        assert await found.metric("vllm:time_to_first_token_seconds_count") == 8
        assert await found.metric("vllm:inter_token_latency_seconds_count") == 1592


async def test_too_little_cache_preempts_and_still_says_the_same() -> None:
    flags = ("--speedup", "0", "--num-gpu-blocks-override", "12", "--max-model-len", "150")
    async with mocker(*flags) as small, mocker("--speedup", "0") as large:
        bodies = [{"prompt": list(range(n, n + 20)), "max_tokens": 100} for n in (100, 200, 300)]
        few = await asyncio.gather(*(small.post(COMPLETIONS, body) for body in bodies))
        many = [await large.post(COMPLETIONS, body) for body in bodies]
        assert await small.metric("vllm:num_preemptions_total") > 0
        assert [a["choices"][0]["text"] for a in few] == [a["choices"][0]["text"] for a in many]


async def test_ranks_have_their_own_blocks_and_a_header_picks_one() -> None:
    async with mocker("--speedup", "0", "--data-parallel-size", "2") as found:
        body = {"prompt": list(range(100, 150)), "max_tokens": 1}
        for _ in range(2):
            await found.post(COMPLETIONS, body, x_data_parallel_rank="1")
        assert await found.metric("vllm:prefix_cache_hits_total", engine="0") == 0
        assert await found.metric("vllm:prefix_cache_hits_total", engine="1") == 48
        assert (await found.call("POST", COMPLETIONS, body, x_data_parallel_rank="2")).status == 400
        assert (await found.call("POST", COMPLETIONS, body, x_data_parallel_rank="a")).status == 400


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": HELLO, "model": "other"}, 404),
        (CHAT, {"messages": "hello"}, 400),
        (CHAT, {"messages": HELLO, "max_tokens": 9000, "stream": True}, 400),
        (COMPLETIONS, {"prompt": [99999]}, 400),
        ("/v1/embeddings", {"input": {}}, 400),
        ("/v1/embeddings", {"input": [{}]}, 400),
        ("/v1/embeddings", {"input": "a", "model": "other"}, 404),
        ("/tokenize", {}, 400),
        ("/detokenize", {"tokens": [99999]}, 400),
        ("/mock/faults", {"nothing": 1}, 400),
        ("/mock/transfer/claim", {}, 400),
        ("/v1/models", {}, 405),
        ("/v1/nothing", {}, 404),
    ],
)
async def test_refusals(fast: MockerProcess, path: str, body: Any, status: int) -> None:
    response = await fast.call("POST", path, body)
    assert response.status == status
    assert b"error" in response.body or b"detail" in response.body


async def test_the_request_id_comes_back(fast: MockerProcess) -> None:
    response = await fast.call("POST", CHAT, {"messages": HELLO, "max_tokens": 1}, x_request_id="abc-1")
    assert (b"x-request-id", b"abc-1") in response.headers
    assert b'"id":"chatcmpl-abc-1"' in response.body


async def test_the_other_paths(fast: MockerProcess) -> None:
    models = await fast.get("/v1/models")
    assert (models["data"][0]["id"], models["data"][0]["max_model_len"]) == ("m", 8192)
    assert (await fast.call("GET", "/health")).status == 200
    assert (await fast.get("/version"))["version"]
    assert await fast.get("/kv_event_sources") == {}
    tokens = (await fast.post("/tokenize", {"prompt": "hello there"}))["tokens"]
    assert (await fast.post("/detokenize", {"tokens": tokens}))["prompt"] == "hello there"
    chat = await fast.post("/tokenize", {"messages": HELLO})
    assert (
        chat["count"]
        == (await fast.post(CHAT, {"messages": HELLO, "max_tokens": 1}))["usage"]["prompt_tokens"]
    )
    one = await fast.post("/v1/embeddings", {"input": "hello there"})
    many = await fast.post("/v1/embeddings", {"input": ["x", "hello there", tokens]})
    assert one["data"][0]["embedding"] == many["data"][1]["embedding"] == many["data"][2]["embedding"]
    assert one["data"][0]["embedding"] != many["data"][0]["embedding"]
    ids = await fast.post("/v1/embeddings", {"input": tokens})
    assert ids["data"][0]["embedding"] == one["data"][0]["embedding"]
