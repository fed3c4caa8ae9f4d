"""Whatever an engine does with OpenAI's API arrives as it sent it, read here with the real client."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai

from dynctl.http.server import Exchange, Request
from dynctl.protocol.instances import ModelCard
from dynctl.protocol.specs import RouterSpec
from tests.integration.frontend_harness import Engine, Front, error_of, frontend, make_spec, sse

USER: Any = [{"role": "user", "content": "hi"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}},
    },
}
IMAGE: Any = [
    {"type": "text", "text": "what is this?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}},
    {"type": "input_audio", "input_audio": {"data": "aGVsbG8=", "format": "wav"}},
]
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 3,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 8},
}


def chunk(*choices: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": list(choices),
        **more,
    }


def delta(index: int = 0, finish: str | None = None, logprobs: Any = None, **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": fields, "logprobs": logprobs, "finish_reason": finish}


def called(arguments: str, **more: Any) -> dict[str, Any]:
    return delta(tool_calls=[{"index": 0, "function": {"arguments": arguments, **more}}])


OTHER_TOKEN = {"token": "b", "logprob": -1.5, "bytes": [98]}
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [OTHER_TOKEN]}]}
EVENTS = sse(
    chunk(delta(role="assistant", content="")),
    chunk(delta(reasoning_content="hm, é", reasoning="hm, é")),
    chunk(delta(content="a", logprobs=LOGPROBS)),
    chunk(delta(1, content="other", vendor_field={"x": [1, 2.50]})),
    chunk(delta(tool_calls=[{"index": 0, "id": "call-1", "type": "function", "function": {"name": "look"}}])),
    chunk(called('{"where": "')),
    chunk(called('up"}')),
    chunk(delta(finish="tool_calls")),
    chunk(delta(1, finish="stop", stop_reason="END")),
    chunk(usage=USAGE),
)


async def says_it_all(engine: Engine, request: Request, exchange: Exchange) -> None:
    exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
    for event in EVENTS:
        exchange.write(event)
    exchange.end()


def fixed(body: bytes, content_type: bytes = b"application/json") -> Any:
    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.respond(200, body, content_type=content_type)

    return script


@asynccontextmanager
async def served(engine: Engine, **spec: Any) -> AsyncIterator[tuple[Front, openai.AsyncOpenAI]]:
    async with (
        frontend(make_spec(**spec), aggregated=[engine]) as front,
        openai.AsyncOpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
    ):
        yield front, client


async def test_tools_reasoning_logprobs_choices_and_usage_of_a_stream_arrive_unchanged() -> None:
    engine = Engine(says_it_all)
    asked: dict[str, Any] = {
        "model": "m",
        "messages": USER,
        "tools": [TOOL],
        "tool_choice": "auto",
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "stop": ["END"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with served(engine) as (front, client):
        pieces = [piece async for piece in front.pieces("/v1/chat/completions", asked)]
        assert b"".join(pieces) == b"".join(EVENTS)
        stream = await client.chat.completions.create(**asked)
        chunks = [one async for one in stream]
    assert engine.bodies()[1] == asked
    deltas = [choice.delta for one in chunks for choice in one.choices]
    calls = [call for found in deltas for call in found.tool_calls or []]
    assert "".join(call.function.arguments or "" for call in calls if call.function) == '{"where": "up"}'
    assert deltas[1].model_extra == {"reasoning_content": "hm, é", "reasoning": "hm, é"}
    assert chunks[2].choices[0].logprobs is not None
    assert {choice.index for one in chunks for choice in one.choices} == {0, 1}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.model_dump(exclude_none=True) == USAGE


async def test_a_whole_answer_with_a_schema_arrives_byte_for_byte() -> None:
    message = {"role": "assistant", "content": '{"a": 1}', "reasoning_content": "because", "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": LOGPROBS, "finish_reason": "stop", "vendor": 1.50}
    answer = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
        "usage": USAGE,
    }
    body = json.dumps(answer, indent=1).encode()
    schema: Any = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": {"type": "object"}, "strict": True},
    }
    engine = Engine(fixed(body))
    async with served(engine) as (front, client):
        found = await client.chat.completions.create(model="m", messages=USER, response_format=schema)
        response = await front.post("/v1/chat/completions", {"model": "m", "messages": USER})
    assert response.body == body
    assert found.choices[0].message.content == '{"a": 1}'
    assert engine.bodies()[0]["response_format"] == schema


async def test_images_and_audio_in_messages_reach_the_engine_and_are_routed_by_likeness() -> None:
    engine = Engine()
    router = RouterSpec(mode="kv")
    async with served(engine, router=router, model=ModelCard(name="m")) as (front, client):
        messages: Any = [{"role": "user", "content": IMAGE}]
        for _ in range(2):
            await client.chat.completions.create(model="m", messages=messages)
        metrics = await front.metrics()
    assert engine.bodies()[0]["messages"] == messages
    assert 'tokenize_fallbacks_total{reason="template_missing"} 2.0' in metrics


async def test_a_form_with_a_file_reaches_the_engine_byte_for_byte() -> None:
    seen = json.dumps({"text": "hello"}).encode()
    engine = Engine(fixed(seen))
    async with served(engine) as (front, client):
        sound = bytes(range(256)) * 300
        heard = await client.audio.transcriptions.create(model="m", file=("a.wav", sound, "audio/wav"))
        assert heard.text == "hello"
        sent = engine.requests[0]
        content_type = sent.header(b"content-type")
        assert content_type is not None
        assert content_type.startswith(b"multipart/form-data; boundary=")
        assert sound in sent.body
        again = await front.post("/v1/audio/translations", sent.body, {"content-type": content_type.decode()})
        assert (again.status, engine.requests[1].body) == (200, sent.body)
        other = sent.body.replace(b"\r\n\r\nm\r\n", b"\r\n\r\nother\r\n")
        told = await front.post("/v1/audio/transcriptions", other, {"content-type": content_type.decode()})
        assert (told.status, error_of(told)["code"]) == (404, "model_not_found")
        cut = await front.post(
            "/v1/audio/transcriptions", sent.body[:-9], {"content-type": content_type.decode()}
        )
        assert (cut.status, "closing boundary" in error_of(cut)["message"]) == (400, True)
        bare = await front.post(
            "/v1/audio/transcriptions", sent.body, {"content-type": "multipart/form-data"}
        )
        assert bare.status == 400
        chat = await front.post("/v1/chat/completions", sent.body, {"content-type": content_type.decode()})
        assert chat.status == 400
    assert [request.path for request in engine.requests] == [
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
    ]


async def test_a_streamed_transcription_is_a_stream() -> None:
    events = sse(
        {"type": "transcript.text.delta", "delta": "he"}, {"type": "transcript.text.done", "text": "he"}
    )

    async def script(engine: Engine, request: Request, exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")], framing="chunked")
        for event in events:
            exchange.write(event)
        exchange.end()

    async with served(Engine(script)) as (_, client):
        file = ("a.wav", b"RIFF", "audio/wav")
        stream = await client.audio.transcriptions.create(model="m", file=file, stream=True)
        assert [event.type async for event in stream] == ["transcript.text.delta", "transcript.text.done"]


async def test_speech_comes_back_as_the_bytes_it_is() -> None:
    sound = bytes(range(256)) * 1000
    async with served(Engine(fixed(sound, b"audio/mpeg"))) as (_, client):
        answer = await client.audio.speech.create(model="m", voice="alloy", input="hello")
        assert answer.response.headers["content-type"] == "audio/mpeg"
        assert await answer.aread() == sound


async def test_images_are_generated_by_a_worker() -> None:
    body = json.dumps({"created": 1, "data": [{"b64_json": "aGVsbG8="}]}).encode()
    async with served(Engine(fixed(body))) as (_, client):
        answer = await client.images.generate(model="m", prompt="a cat")
        assert answer.data is not None
        assert answer.data[0].b64_json == "aGVsbG8="
