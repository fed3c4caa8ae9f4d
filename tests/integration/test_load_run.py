"""Loads on a real simulated engine, and on servers that do what they should not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from dynctl.errors import (
    ConnectFailed,
    DeadlineExceeded,
    EngineFailed,
    ModelNotFound,
    Overloaded,
    ProfileError,
    Unauthorized,
)
from dynctl.hub import ASSETS
from dynctl.perfmodel.trace import TraceRequest
from dynctl.profiler.load.client import Asker, split_url
from dynctl.profiler.load.run import Watch, measure, run
from dynctl.profiler.load.spec import Closed, Endpoint, Lengths, Load, Open, Replay
from tests.integration.mocker_process import MockerProcess, mocker

TINY = str(ASSETS / "tiny")
LOAD = Load(
    arrivals=Closed(concurrency=4),
    requests=12,
    warmup=4,
    isl=Lengths(tokens=60),
    osl=Lengths(tokens=8),
    seed=1,
)
TRUSTED = "the client itself"
"""The machine of a test may be too busy for a problem that begins so to be absent."""


@pytest.fixture
async def engine() -> AsyncIterator[MockerProcess]:
    async with mocker("--served-model-name", "tiny") as running:
        yield running


def at(engine: MockerProcess, tokenizer: str = TINY) -> Endpoint:
    return Endpoint(url=str(engine.origin), model="tiny", tokenizer=tokenizer)


def changed(**values: Any) -> Load:
    return msgspec.structs.replace(LOAD, **values)


def faults(problems: tuple[str, ...]) -> list[str]:
    """Problems but those of a busy machine."""
    return [one for one in problems if not one.startswith(TRUSTED) and "after their time" not in one]


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("tokenizer", [TINY, ""])
async def test_a_closed_loop_is_measured_with_prompts_of_the_length_asked_for(
    engine: MockerProcess, api: str, tokenizer: str
) -> None:
    found = await measure(changed(api=api), at(engine, tokenizer))
    assert (found.counts.completed, found.counts.warmup, found.counts.short) == (12, 4, 0)
    assert found.input_tokens is not None
    assert found.input_tokens.mean == pytest.approx(60, abs=0 if tokenizer else 6)
    assert found.output_tokens is not None
    assert found.output_tokens.min == found.output_tokens.max == 8
    assert found.cached == 0.0
    assert not faults(found.problems)


async def test_an_open_loop_sends_at_its_times_whatever_becomes_of_the_rest(engine: MockerProcess) -> None:
    load = changed(arrivals=Open(rate=40, burstiness=None), requests=40, warmup=0, osl=Lengths(tokens=60))
    measured = await run(load, at(engine), Watch())
    due = sorted(record.due_s for record in measured.records)
    assert due == pytest.approx([n / 40 for n in range(40)])
    assert all(record.sent_s >= record.due_s for record in measured.records)
    assert not faults(measured.result.problems)


async def test_the_same_load_again_is_found_in_the_cache_and_told_of(engine: MockerProcess) -> None:
    await measure(LOAD, at(engine))
    again = await measure(LOAD, at(engine))
    assert "use another seed" in str(again.problems)
    other = await measure(changed(seed=2), at(engine))
    assert "use another seed" not in str(other.problems)


async def test_shared_beginnings_are_found_in_the_cache_as_they_should_be(engine: MockerProcess) -> None:
    load = changed(isl=Lengths(tokens=320), shared_tokens=256, requests=12, api="completions")
    found = await measure(load, at(engine))
    assert found.cached == pytest.approx(0.8, abs=0.03)
    assert not faults(found.problems)


async def test_a_trace_shares_as_its_blocks_say(engine: MockerProcess) -> None:
    blocks = [(1, 2), (1, 3), (9, 4)]
    requests = tuple(
        TraceRequest(at_s=n, prompt_tokens=1024, output_tokens=3, blocks=ids) for n, ids in enumerate(blocks)
    )
    load = Load(arrivals=Replay(requests=requests, speedup=5), api="completions", seed=3)
    measured = await run(load, at(engine), Watch())
    by_number = sorted(measured.records, key=lambda record: record.number)
    assert [record.cached_tokens for record in by_number] == [0, 512, 0]
    assert [record.input_tokens for record in by_number] == [1024] * 3
    assert by_number[2].due_s == pytest.approx(0.4)


async def test_a_conversation_carries_its_past(engine: MockerProcess) -> None:
    load = changed(turns=3, requests=4, warmup=0, isl=Lengths(tokens=100))
    measured = await run(load, at(engine), Watch())
    sizes = {
        turn: {record.input_tokens for record in measured.records if record.turn == turn} for turn in range(3)
    }
    assert sizes[0] == {100}
    # The last answer, the next question and the template's words around them.
    assert all(208 <= size <= 230 for size in sizes[1])
    assert all(316 <= size <= 360 for size in sizes[2])
    late = [record for record in measured.records if record.turn == 2]
    assert all((record.cached_tokens or 0) >= 192 for record in late)


async def test_a_stopped_load_keeps_what_was_measured_and_lets_go_of_the_rest(engine: MockerProcess) -> None:
    watch = Watch()
    load = changed(requests=0, duration_s=100.0, osl=Lengths(tokens=50), warmup=0)
    work = asyncio.create_task(run(load, at(engine), watch))
    asyncio.get_running_loop().call_later(1.5, watch.stop.set)
    measured = await asyncio.wait_for(work, 30)
    assert measured.result.counts.completed >= 6
    assert measured.result.counts.interrupted == 4
    assert "stopped with 4 requests in flight" in str(measured.result.problems)
    assert watch.in_flight == 0
    await engine.until(lambda state: not state["running"])


async def test_an_unknown_model_and_one_too_long_are_told_at_once(engine: MockerProcess) -> None:
    with pytest.raises(ModelNotFound):
        await measure(LOAD, msgspec.structs.replace(at(engine), model="other"))
    with pytest.raises(Exception, match="maximum context length"):
        await measure(changed(isl=Lengths(tokens=9000), requests=20), at(engine))


async def test_prompts_shorter_than_what_the_server_adds_are_refused(engine: MockerProcess) -> None:
    with pytest.raises(ProfileError, match="the server adds"):
        await measure(changed(isl=Lengths(tokens=2)), at(engine))


# --- servers that do what they should not


@asynccontextmanager
async def server(*answers: bytes, hang: bool = False) -> AsyncIterator[Endpoint]:
    """Answers its requests with these, the last one again and again; closes after each."""
    left = list(answers)
    closing = asyncio.Event()
    serving: set[asyncio.Task[Any] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        serving.add(task)
        try:
            await reply_to(reader, writer)
        finally:
            writer.close()
            serving.discard(task)

    async def reply_to(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().splitlines()
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")]
        await reader.readexactly(sum(lengths))
        if hang:
            await closing.wait()
            return
        writer.write(left.pop(0) if len(left) > 1 else left[0])

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield Endpoint(url=f"http://127.0.0.1:{port}", model="m")
    finally:
        closing.set()
        listening.close()
        await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)


def answer(body: bytes, status: str = "200 OK") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: text/event-stream\r\nconnection: close\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def streamed(tokens: int, *, usage: int | None = None, done: bool = True, prompt: int = 60) -> bytes:
    events: list[dict[str, Any]] = [
        {"choices": [{"delta": {"content": "x"}, "finish_reason": None}]} for _ in range(tokens)
    ]
    if usage is not None:
        events.append({"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": usage}})
    text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return answer((text + ("data: [DONE]\n\n" if done else "")).encode())


FIT = (streamed(1, usage=1, prompt=16), streamed(1, usage=1, prompt=272))


async def test_a_server_that_counts_nothing_is_not_relied_on() -> None:
    async with server(streamed(8)) as endpoint:
        found = await measure(LOAD, endpoint)
    assert found.counts.uncounted == 12
    assert found.output_tokens is not None
    assert found.output_tokens.mean == 8
    assert "without usage" in str(found.problems)


async def test_an_answer_that_ends_early_is_told_of() -> None:
    async with server(*FIT, streamed(5, usage=5)) as endpoint:
        found = await measure(LOAD, endpoint)
    assert found.counts.short == 12
    assert "12 of 12 answers ended before as many tokens as asked for" in found.problems


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (answer(b'{"error":{"message":"bad key"}}', "401 Unauthorized"), Unauthorized, "status 401: bad key"),
        (answer(b'{"error":{"message":"full"}}', "429 Too Many"), Overloaded, "status 429: full"),
        (answer(b"<html>", "502 Bad Gateway"), EngineFailed, "status 502: <html>"),
        (streamed(3, done=False), EngineFailed, "broke off"),
        (streamed(0, usage=0), EngineFailed, "no token"),
        (answer(b'data: {"error":{"message":"no memory"}}\n\n'), EngineFailed, "no memory"),
        (answer(b'{"choices":[]}'), EngineFailed, "no token"),
    ],
)
async def test_what_a_server_answers_instead_of_tokens_is_told(
    reply: bytes, kind: type[Exception], said: str
) -> None:
    """At once when the first request meets it; as that of all when it begins after the first two."""
    async with server(reply) as endpoint:
        with pytest.raises(kind, match=said):
            await measure(LOAD, endpoint)
    async with server(*FIT, reply) as endpoint:
        with pytest.raises(kind, match=f"the first 10 requests all failed: .*{said}"):
            await measure(LOAD, endpoint)


async def test_some_failures_are_counted_and_not_averaged_in() -> None:
    broken = streamed(3, done=False)
    async with server(*FIT, broken, *[streamed(8, usage=8)] * 6, broken, streamed(8, usage=8)) as endpoint:
        found = await measure(changed(warmup=0), endpoint)
    assert (found.counts.completed, found.counts.failed) == (10, 2)
    assert found.ttft_s is not None
    assert found.ttft_s.count == 10
    assert "2 of 12 requests failed, most often:" in found.problems[0]


async def test_a_server_that_is_silent_meets_the_deadline() -> None:
    async with server(b"", hang=True) as endpoint:
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            await measure(changed(deadline_s=0.3), endpoint)
        assert time.monotonic() - began_s < 30


async def test_a_server_that_is_not_there_cannot_be_connected_to() -> None:
    async with server(b"") as endpoint:
        pass
    with pytest.raises(ConnectFailed):
        await measure(LOAD, endpoint)


def test_urls_with_and_without_their_path() -> None:
    assert [split_url(url)[1] for url in ("http://h", "http://h/v1", "http://h/a/v1/")] == ["", "", "/a"]


async def test_models_of_a_server_that_lists_none() -> None:
    async with server(answer(b"not json")) as endpoint:
        asker = Asker(msgspec.structs.replace(endpoint, api_key="k"))
        assert await asker.models() == []
        await asker.close()
