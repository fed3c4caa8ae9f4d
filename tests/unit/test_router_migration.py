from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.engines.base import CONTINUES_AND_HOLDS_BACK, CONTINUES_MESSAGE, Continuation
from dynctl.protocol.sse import event_data, split_events
from dynctl.router.migration import CannotContinue, continuation, stops_of, whole_words, window_of
from dynctl.router.said import Said

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"prompt": "P:", "max_tokens": 10}


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chat(text: str, **choice: Any) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "delta": {"content": text}, **choice}]})


def plain(text: str, **choice: Any) -> bytes:
    return event({"id": "x", "choices": [{"index": 0, "text": text, **choice}]})


def said(*events: bytes) -> Said:
    told = Said()
    told.feed(b"".join(events))
    return told


def nobody(_: str) -> None:
    """There is no tokenizer."""


def letters(text: str) -> list[int]:
    """A token a character."""
    return [ord(letter) for letter in text]


@given(st.lists(st.sampled_from([b"data: {}\n\n", b": ping\n\n", b"data: x\r\n\r\n"])), st.integers(0, 200))
def test_events_are_split_alike_wherever_the_bytes_are_cut(parts: list[bytes], cut: int) -> None:
    whole = b"".join(parts)
    first, rest = split_events(whole[:cut])
    second, left = split_events(rest + whole[cut:])
    assert first + second == parts
    assert left == b""


def test_an_event_carries_its_data_lines_and_nothing_else() -> None:
    assert event_data(b"event: x\ndata: a\ndata:b\n: no\n\n") == b"a\nb"
    assert event_data(b": ping\n\n") == b""


def test_what_was_said_is_read_with_half_an_event_left_out() -> None:
    first = {"id": "x", "object": "o", "created": 1, "model": "m", "system_fingerprint": "f"}
    told = said(
        event({**first, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}),
        chat("Hel"),
        b": ping\n\n",
        chat("lo", finish_reason="stop"),
        b'data: {"id": "x", "choices": [{"delta": {"content": "never'[:40],
    )
    assert told.head == {"id": "x", "object": "o", "created": 1, "model": "m"}
    assert (told.text, told.role, told.finish, told.spoken) == ("Hello", True, "stop", 2)
    assert said().text == ""
    told.feed(b'"}}]}\n\ndata: [DONE]\n\n')
    assert told.done


def test_token_ids_are_known_until_a_text_comes_without_them() -> None:
    told = said(plain("a", token_ids=[1], prompt_token_ids=[7, 8]), plain("b", token_ids=[2, 3]))
    assert (told.tokens, told.prompt_ids, told.lags) == ([1, 2, 3], [7, 8], False)
    told.feed(plain("", token_ids=[4]))
    assert told.lags
    told.feed(plain("c"))
    assert told.tokens is None
    told.feed(plain("d", token_ids=[9]))
    assert told.tokens is None


@pytest.mark.parametrize(
    "data", [b"data: [1]\n\n", b"data: {x\n\n", event({"choices": [3]}), event({"usage": 4})]
)
def test_a_chunk_of_unknown_shape_ends_what_is_known(data: bytes) -> None:
    told = said(data)
    assert not told.lasting
    with pytest.raises(CannotContinue, match="no form"):
        continuation("completions", TEXT, told, 0, CONTINUES_MESSAGE, nobody)


def test_a_chat_goes_on_as_its_last_message() -> None:
    request = {**CHAT, "messages": msgspec.Raw(json.dumps(CHAT["messages"]).encode()), "max_tokens": 9}
    request |= {"max_completion_tokens": 8, "min_tokens": 6, "seed": 1}
    rest = continuation("chat", request, said(chat(" Hel"), chat("lo \n")), 4, CONTINUES_MESSAGE, nobody)
    assert rest["messages"] == [*CHAT["messages"], {"role": "assistant", "content": " Hello"}]
    assert (rest["continue_final_message"], rest["add_generation_prompt"]) == (True, False)
    assert (rest["max_tokens"], rest["max_completion_tokens"], rest["min_tokens"]) == (5, 4, 2)
    assert rest["seed"] == 1


def test_a_chat_that_continues_a_message_continues_it_further() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Well:"}]
    request = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    rest = continuation("chat", request, said(chat(" yes")), 1, CONTINUES_MESSAGE, nobody)
    assert rest["messages"][-1] == {"role": "assistant", "content": "Well: yes"}
    assert messages[-1]["content"] == "Well:"
    messages[-1]["content"] = [{"type": "text", "text": "Well:"}]
    with pytest.raises(CannotContinue, match="plain text"):
        continuation("chat", request, said(chat(" yes")), 1, CONTINUES_MESSAGE, nobody)


def test_a_chat_of_which_nothing_or_blanks_were_said_is_asked_anew() -> None:
    assert continuation("chat", CHAT, said(chat(""), chat("\n")), 0, CONTINUES_MESSAGE, nobody) == CHAT


def test_a_completion_goes_on_by_exact_tokens_before_text() -> None:
    dialect = CONTINUES_MESSAGE
    assert continuation("completions", TEXT, said(plain("a")), 1, dialect, nobody)["prompt"] == "P:a"
    one = {**TEXT, "prompt": ["P:"]}
    assert continuation("completions", one, said(plain("a")), 1, dialect, nobody)["prompt"] == "P:a"
    ids = said(plain("a", token_ids=[5], prompt_token_ids=[1, 2]))
    assert continuation("completions", TEXT, ids, 1, dialect, nobody)["prompt"] == [1, 2, 5]
    given_ids = {**TEXT, "prompt": [[3, 4]]}
    told = said(plain("a", token_ids=[5]))
    assert continuation("completions", given_ids, told, 1, dialect, nobody)["prompt"] == [3, 4, 5]
    assert continuation("completions", given_ids, said(plain("a")), 1, dialect, letters)["prompt"] == [
        3,
        4,
        97,
    ]
    with pytest.raises(CannotContinue, match="not one text"):
        continuation("completions", given_ids, said(plain("a")), 1, dialect, nobody)
    with pytest.raises(CannotContinue, match="not one text"):
        continuation("completions", {**TEXT, "prompt": ["a", "b"]}, said(plain("a")), 1, dialect, nobody)


def test_the_engines_own_limit_holds_for_all_legs_together() -> None:
    unlimited = {"prompt": "P:"}
    assert (
        continuation("completions", unlimited, said(plain("a")), 6, CONTINUES_MESSAGE, nobody)["max_tokens"]
        == 10
    )
    assert continuation("completions", unlimited, said(plain("a")), 16, CONTINUES_MESSAGE, nobody) == {}
    free = Continuation(completion_tokens=None)
    assert "max_tokens" not in continuation("completions", unlimited, said(plain("a")), 99, free, nobody)
    null = {"prompt": "P:", "max_tokens": None}
    assert (
        continuation("completions", null, said(plain("a")), 99, CONTINUES_MESSAGE, nobody)["max_tokens"]
        is None
    )


def test_nothing_is_asked_when_all_was_said() -> None:
    assert continuation("completions", TEXT, said(plain("a")), 10, CONTINUES_MESSAGE, nobody) == {}
    ended = said(chat("", tool_calls=[]), chat("a", finish_reason="stop"))
    assert continuation("chat", CHAT, ended, 1, CONTINUES_MESSAGE, nobody) == {}


@pytest.mark.parametrize(
    ("fields", "told", "why"),
    [
        ({"n": 2}, said(chat("a")), "`n`"),
        ({"best_of": 3}, said(chat("a")), "`best_of`"),
        ({"use_beam_search": True}, said(chat("a")), "beam"),
        ({"response_format": msgspec.Raw(b'{"type":"json_schema"}')}, said(chat("a")), "response_format"),
        ({"guided_regex": "x"}, said(chat("a")), "guided_regex"),
        ({"structured_outputs": {"json": {}}}, said(chat("a")), "structured_outputs"),
        ({"echo": True}, said(chat("a")), "echo"),
        ({"prompt_logprobs": 1}, said(chat("a")), "prompt_logprobs"),
        ({"tool_choice": "required"}, said(chat("a")), "tool_choice"),
        ({"tool_choice": {"type": "function"}}, said(chat("a")), "tool_choice"),
        ({"add_generation_prompt": False}, said(chat("a")), "add_generation_prompt"),
        ({}, said(chat("a"), chat("b", index=1)), "several"),
        ({}, said(event({"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]})), "tool call"),
        ({}, said(chat("a", token_ids=[1]), chat("", token_ids=[2])), "held back"),
        ({"stop": "x"}, said(chat("a", token_ids=[1])), "held back"),
        ({}, said(chat("a\n", token_ids=[1])), "white space"),
    ],
)
def test_what_no_second_worker_could_say_rightly_is_refused_with_the_reason(
    fields: dict[str, Any], told: Said, why: str
) -> None:
    with pytest.raises(CannotContinue, match=why):
        continuation("chat", {**CHAT, **fields}, told, 1, CONTINUES_MESSAGE, nobody)


def test_tools_that_were_not_called_and_plain_text_formats_go_on() -> None:
    request = {**CHAT, "tools": [{}], "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1}
    assert continuation("chat", request, said(chat("a")), 1, CONTINUES_MESSAGE, nobody)["tools"] == [{}]


def test_an_engine_that_cannot_continue_a_message_is_not_asked_to() -> None:
    with pytest.raises(CannotContinue, match="with tools"):
        continuation("chat", CHAT, said(chat("a")), 1, Continuation(), nobody)


def test_stop_strings_are_read_in_both_spellings() -> None:
    assert stops_of({"stop": "a"}) == ("a",)
    assert stops_of({"stop": msgspec.Raw(b'["a", "", 3, "b"]')}) == ("a", "b")
    assert stops_of({}) == ()


def test_an_engine_holds_back_what_may_begin_its_longest_stop_string() -> None:
    assert window_of({"stop": ["abc", "d"]}) == 2
    assert window_of({"stop": ["abc"], "include_stop_str_in_output": True}) == 0
    assert window_of({}) == 0


def test_beside_stop_strings_a_greedy_answer_goes_on_from_its_last_whole_word() -> None:
    asked = {"temperature": 0, "stop": ["zebra"]}
    for text, whole in (("ports gr", "ports"), ("ports\n\n", "ports"), ("gr", ""), ("a " + "x" * 70, None)):
        kept = whole_words(asked, said(plain(text)), CONTINUES_AND_HOLDS_BACK)
        assert text[:kept] == (text if whole is None else whole)
    told = said(plain("ports gr"))
    rest = continuation("completions", {**TEXT, **asked}, told, 1, CONTINUES_AND_HOLDS_BACK, nobody)
    assert rest["prompt"] == "P:ports"
    assert whole_words(asked, told, CONTINUES_MESSAGE) == len("ports gr")
    others: tuple[dict[str, Any], ...] = (
        {"stop": ["zebra"]},
        {**asked, "temperature": 0.5},
        {**asked, "logprobs": 1},
        {**asked, "logprobs": 0},
        {**asked, "include_stop_str_in_output": True},
        {"temperature": 0},
    )
    for other in others:
        assert whole_words(other, told, CONTINUES_AND_HOLDS_BACK) == len("ports gr")
