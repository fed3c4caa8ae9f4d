"""Reading requests: what is asked for, and refusals that name the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynctl.mocker.requests import ApiError, Generation, Serving, decode_body, parse_generation
from dynctl.mocker.tokens import BUILTIN, Vocabulary

VOCABULARY = Vocabulary(BUILTIN)
SERVING = Serving("tiny", VOCABULARY, 64, 20)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**given: Any) -> Generation:
    return parse_generation(json.dumps({"messages": HELLO, **given}).encode(), True, SERVING)


def completion(**given: Any) -> Generation:
    return parse_generation(json.dumps({"prompt": "hello", **given}).encode(), False, SERVING)


def test_defaults_differ_by_endpoint() -> None:
    assert chat().max_tokens == (20,)
    assert completion().max_tokens == (16,)
    assert completion().prompts == (tuple_of("hello"),)


def tuple_of(text: str) -> list[int]:
    return VOCABULARY.encode(text)


def test_the_default_shrinks_to_the_context_that_is_left() -> None:
    assert completion(prompt=[5] * 60).max_tokens == (4,)


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=3, max_completion_tokens=5).max_tokens == (5,)


@pytest.mark.parametrize(
    ("prompt", "count"), [([5, 6], 1), ([[5, 6], [7]], 2), (["a", "b"], 2), ("text", 1), (["a", [5]], 2)]
)
def test_prompts_in_every_form(prompt: Any, count: int) -> None:
    assert len(completion(prompt=prompt).prompts) == count


def test_fields_are_taken_over() -> None:
    asked = chat(
        stream=True,
        stream_options={"include_usage": True},
        n=2,
        stop="x",
        min_tokens=2,
        ignore_eos=True,
        return_token_ids=True,
        cache_salt="s",
        kv_transfer_params={"a": 1},
        unknown_field={"is": "ignored"},
    )
    assert (asked.stream, asked.usage, asked.choices, asked.stop, asked.min_tokens) == (
        True,
        True,
        2,
        ("x",),
        2,
    )
    assert (asked.ignore_eos, asked.token_ids, asked.salt, asked.transfer) == (True, True, "s", {"a": 1})
    assert chat(stop=["a", "", "b"]).stop == ("a", "b")


def test_a_continued_chat_has_the_open_message_as_the_end_of_its_prompt() -> None:
    open_turn = [*HELLO, {"role": "assistant", "content": " cache the"}]
    asked = chat(messages=open_turn, add_generation_prompt=False, continue_final_message=True)
    whole = chat()
    assert asked.prompts[0] == whole.prompts[0] + VOCABULARY.encode(" cache the")


def test_prompt_token_ids_of_a_prefill_are_used_as_they_are() -> None:
    asked = chat(kv_transfer_params={"prompt_token_ids": [7, 8, 9]})
    assert asked.prompts == ([7, 8, 9],)


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}, "?"]
    assert chat(messages=[{"role": "user", "content": parts}]).prompts == chat().prompts


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"model": "other"}, "model", "does not exist"),
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hi"}, "messages", "Expected `array`"),
        ({"messages": [{"content": "hi"}]}, "messages", "refused the messages"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "5"}, "max_tokens", "Expected `int"),
        ({"max_tokens": 60}, "input_tokens", "maximum context length is 64 tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens", "at most max_tokens=3"),
        ({"min_tokens": -1}, "min_tokens", "must not be negative"),
        ({"temperature": -0.5}, "temperature", "non-negative"),
        ({"n": 0}, "n", "n must be 1 to"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=True"),
        (
            {"stream": True, "stream_options": {"include_usage": 5}},
            "stream_options.include_usage",
            "Expected",
        ),
        ({"continue_final_message": True}, None, "Cannot set both"),
        ({"kv_transfer_params": {"prompt_token_ids": ["a"]}}, "prompt", "a prompt is text"),
    ],
)
def test_a_refusal_names_the_field(given: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        chat(**given)
    body = json.loads(caught.value.body())["error"]
    assert body["param"] == param
    assert body["code"] == (404 if param == "model" else 400)
    assert body["type"] == ("NotFoundError" if param == "model" else "BadRequestError")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "must not be empty"),
        ([], "must not be empty"),
        ([[]], "must not be empty"),
        ([{}], "a prompt is text"),
        ([1, "a"], "a prompt is text"),
        ([True], "a prompt is text"),
        ([10**6], "out of vocabulary"),
        ([-1], "out of vocabulary"),
    ],
)
def test_prompts_that_are_none(prompt: Any, words: str) -> None:
    with pytest.raises(ApiError, match=words):
        completion(prompt=prompt)


def test_broken_json_and_missing_fields() -> None:
    with pytest.raises(ApiError, match="invalid JSON"):
        parse_generation(b"{", True, SERVING)
    with pytest.raises(ApiError, match="missing required field `messages`") as caught:
        parse_generation(b"{}", True, SERVING)
    assert caught.value.param == "messages"
    with pytest.raises(ApiError) as caught:
        decode_body(b"[]", dict)
    assert caught.value.param is None


def test_a_model_without_a_template_refuses_chats(tmp_path: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    bare = Serving("tiny", Vocabulary(tmp_path), 64, 20)
    with pytest.raises(ApiError, match="no chat template"):
        parse_generation(json.dumps({"messages": HELLO}).encode(), True, bare)
