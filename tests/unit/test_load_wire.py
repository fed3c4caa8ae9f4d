"""A streamed answer, however its bytes are cut: what counts as a token, and what as an end."""

from __future__ import annotations

import itertools
import json

import pytest

from dynctl.http.framing import LAST_CHUNK, frame_chunk
from dynctl.profiler.load.wire import Answer


def chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":12,"completion_tokens":3,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
STREAM = chunk("") + chunk(" a") + chunk(' "content":"x"') + chunk(" c", "length") + USAGE + DONE


def fed(data: bytes, size: int, *, chunked: bool = False, keep: bool = False) -> Answer:
    clock = itertools.count(1)
    answer = Answer(lambda: float(next(clock)), chunked=chunked, keep=keep)
    for start in range(0, len(data), size):
        answer.feed(data[start : start + size])
    return answer


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_however_bytes_are_cut_the_same_tokens_are_seen(size: int, chunked: bool) -> None:
    data = STREAM
    if chunked:
        data = b"".join(frame_chunk(STREAM[i : i + 50]) for i in range(0, len(STREAM), 50)) + LAST_CHUNK
    answer = fed(data, size, chunked=chunked)
    assert len(answer.times) == 3
    assert (answer.counted("prompt_tokens"), answer.counted("completion_tokens"), answer.cached) == (12, 3, 4)
    assert (answer.finish, answer.whole, answer.error) == ("length", True, "")


def test_the_first_token_is_the_first_that_is_not_empty() -> None:
    role = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    assert not fed(role, 10_000).times
    assert list(fed(role + chunk("x"), len(role)).times) == [3.0]


def test_pieces_that_come_together_have_one_time() -> None:
    assert list(fed(chunk("a") + chunk("b"), 10_000).times) == [1.0, 1.0]


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"text":"x","finish_reason":null}]}\n\n',
        b'data: {"choices": [{"text": "x"}]}\n\n',
        b'data: {"choices":[{"delta":{"reasoning_content":"x"}}]}\n\n',
        b'data: {"choices":[{"delta":{"tool_calls":[{"function":{"arguments":"{"}}]}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"x"}}]}\r\n\r\n',
    ],
)
def test_what_is_said_in_other_ways_counts_too(event: bytes) -> None:
    assert len(fed(event, 5).times) == 1


def test_a_word_in_the_text_is_no_field() -> None:
    said = chunk(' {"usage":{"prompt_tokens":9},"error":{"message":"no"}} [DONE]')
    answer = fed(said, 10_000)
    assert (answer.usage, answer.error, answer.whole) == ({}, "", False)


@pytest.mark.parametrize(
    "event", [b'data: {"error":{"message":"out of memory"}}\n\n', b'data: {"error":"out of memory"}\n\n']
)
def test_an_error_in_the_stream_is_one(event: bytes) -> None:
    assert fed(chunk("a") + event, 10_000).error == "out of memory"


def test_an_event_that_is_no_json_is_an_error() -> None:
    assert "no JSON object" in fed(b'data: {"usage":{ \n\n', 10_000).error


def test_an_answer_without_usage_tells_no_counts() -> None:
    answer = fed(chunk("a") + b'data: {"usage":null,"choices":[]}\n\n' + DONE, 10_000)
    assert (answer.counted("completion_tokens"), answer.cached) == (0, None)


def test_the_text_is_kept_when_asked_for() -> None:
    assert "".join(fed(STREAM, 10, keep=True).said) == ' a "content":"x" c'
