from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from dynctl.engines.base import CONTINUES_MESSAGE, Continuation
from dynctl.router.as_chat import Retelling
from dynctl.router.migration import CannotContinue
from dynctl.router.reasoning import Marks
from dynctl.router.retell import Source, check_tokens, made, retells, retold
from dynctl.router.said import Said
from dynctl.router.seam import Joint, Seam, Taken

CHAT: dict[str, Any] = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
MARKS = Marks("<think>", "</think>", specials=("<|end|>",))
OPENED = Source("U:hi\nA:<think>\n", MARKS, 9)
CLOSED = Source("U:hi\nA:", MARKS, 9)
NONE = Continuation(completion_tokens=None)
HEAD = {"id": "c-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}


def said(*deltas: dict[str, Any], **more: Any) -> Said:
    told = Said()
    told.take({**HEAD, "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}], **more})
    for delta in deltas:
        ids = {"token_ids": delta.pop("ids")} if "ids" in delta else {}
        told.take({**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": None, **ids}]})
    return told


def thinks(text: str, **more: Any) -> dict[str, Any]:
    return {"reasoning_content": text, **more}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"content": text, **more}


@pytest.mark.parametrize(
    ("told", "dialect", "wanted"),
    [
        (said(says("a")), CONTINUES_MESSAGE, False),
        (said(thinks("a")), CONTINUES_MESSAGE, True),
        (said({"reasoning": "a"}), CONTINUES_MESSAGE, True),
        (said(says("a")), NONE, True),
        (said(), NONE, False),
        (said(), CONTINUES_MESSAGE, False),
    ],
)
def test_only_what_no_engine_could_continue_as_a_message_is_asked_for_as_a_completion(
    told: Said, dialect: Continuation, wanted: bool
) -> None:
    assert retells("chat", CHAT, told, dialect) is wanted
    assert retells("completions", {"prompt": "x"}, told, dialect) is False


def test_a_call_of_a_tool_is_not_looked_for_in_raw_text() -> None:
    tools = {**CHAT, "tools": [{"type": "function"}]}
    with pytest.raises(CannotContinue, match="tools offered"):
        retells("chat", tools, said(thinks("a")), CONTINUES_MESSAGE)
    assert not retells("chat", tools, said(says("a")), NONE)
    assert retells("chat", {**tools, "tool_choice": "none"}, said(thinks("a")), CONTINUES_MESSAGE)
    assert retells("chat", {**tools, "tools": []}, said(thinks("a")), CONTINUES_MESSAGE)


@pytest.mark.parametrize(
    ("told", "source", "text"),
    [
        (said(thinks("hm ")), OPENED, "hm "),
        (said(thinks("hm ")), CLOSED, "<think>hm "),
        (said(thinks("hm"), says("\n\nso ")), OPENED, "hm</think>\n\nso "),
        (said(thinks("hm"), says("so")), CLOSED, "<think>hm</think>so"),
        (said(says("so ")), OPENED, "so "),
    ],
)
def test_what_was_generated_is_put_together_with_the_marks_that_the_prompt_did_not_hold(
    told: Said, source: Source, text: str
) -> None:
    assert made(told, source).text == text
    assert made(told, source).kept == len(text)


def test_marks_that_are_not_known_and_reasoning_begun_anew_are_refused() -> None:
    unknown = Source("U:hi\nA:", None)
    with pytest.raises(CannotContinue, match="marks"):
        made(said(thinks("hm")), unknown)
    with pytest.raises(CannotContinue, match="anew"):
        made(said(thinks("hm"), says("a"), thinks("hm")), CLOSED)
    assert made(said(says("a")), unknown).text == "a"
    known = said(thinks("hm", ids=[1]), says("a", ids=[2]), prompt_token_ids=[7])
    assert made(known, Source(None, None)).text == "hma"


def ask(request: dict[str, Any], told: Said, spoken: int = 2, source: Source = OPENED, **dialect: Any) -> Any:
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in request.items()}
    return retold(raw, told, spoken, [1, 2, 3], source, Continuation(**dialect))


def plain(rest: dict[str, Any]) -> dict[str, Any]:
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(rest))
    return decoded


def test_fields_of_a_chat_are_left_out_or_said_as_a_completion_says_them() -> None:
    request = {
        **CHAT,
        "max_completion_tokens": 10,
        "max_tokens": 99,
        "min_tokens": 5,
        "logprobs": True,
        "top_logprobs": 3,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": True},
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "seed": 1,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "ignore_eos": True,
    }
    rest, how = ask(request, said(thinks("hm")))
    assert plain(rest) == {
        "model": "m",
        "stream": True,
        "prompt": [1, 2, 3],
        "max_tokens": 8,
        "min_tokens": 3,
        "logprobs": 3,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "seed": 1,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "ignore_eos": True,
    }
    assert how == Retelling("</think>", ("reasoning_content",), (), 3)
    rest, _ = ask({**CHAT, "logprobs": False}, said(thinks("hm")))
    assert plain(rest)["logprobs"] is None


def test_a_chat_without_a_limit_goes_to_the_end_of_the_context_and_not_to_a_completions_limit() -> None:
    source = Source("", MARKS, 9, context=50)
    assert ask(CHAT, said(thinks("hm")), source=source)[0]["max_tokens"] == 47
    assert ask({**CHAT, "max_tokens": 99}, said(thinks("hm")), source=source)[0]["max_tokens"] == 47
    assert ask(CHAT, said(thinks("hm")))[0]["max_tokens"] is None
    assert "max_tokens" not in ask(CHAT, said(thinks("hm")), completion_tokens=None)[0]
    assert ask({**CHAT, "max_tokens": 2}, said(thinks("hm")))[0] == {}
    assert ask(CHAT, said(thinks("hm")), source=Source("", MARKS, 9, context=3))[0] == {}


def test_special_tokens_are_asked_for_only_where_the_end_of_reasoning_would_not_be_seen() -> None:
    hidden = Source("A:", Marks("[T]", "[/T]", True, ("</s>",)), 9)
    rest, how = ask(CHAT, said(thinks("hm")), source=hidden)
    assert rest["skip_special_tokens"] is False
    assert how.leaves_out == ("</s>", "[T]")
    rest, how = ask({**CHAT, "skip_special_tokens": False}, said(thinks("hm")), source=hidden)
    assert how.leaves_out == ()
    rest, how = ask(CHAT, said(thinks("hm"), says("a")), source=hidden)
    assert "skip_special_tokens" not in rest
    assert how.closing == ""


def test_by_token_ids_reasoning_is_over_when_its_mark_was_among_them() -> None:
    exact = Source(None, MARKS, 9)
    going_on = said(thinks("hm", ids=[5]), prompt_token_ids=[7])
    assert ask(CHAT, going_on, source=exact)[1].closing == "</think>"
    over = said(thinks("hm", ids=[5]), {"ids": [9]}, prompt_token_ids=[7])
    assert ask(CHAT, over, source=exact)[1].closing == ""
    check_tokens(CHAT, over, exact)
    held = said(thinks("hm", ids=[5]), {"ids": [6]}, prompt_token_ids=[7])
    with pytest.raises(CannotContinue, match="held back"):
        check_tokens(CHAT, held, exact)
    with pytest.raises(CannotContinue, match="held back"):
        check_tokens({**CHAT, "stop": "x"}, going_on, exact)


def rest_of(told: Said, how: Retelling, text: str = "", **joint: Any) -> Seam:
    taken = Taken(2, made(told, OPENED), how)
    assert taken.made.text.endswith(text)
    return Seam(told, Joint.of("chat", {"stream_options": {"include_usage": True}, **joint}, told, 5, taken))


def raw(text: str, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None, **more}
    chunk = {"id": "cmpl-9", "object": "text_completion", "created": 9, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def deltas(out: bytes) -> list[Any]:
    parts = [part.removeprefix("data: ") for part in out.decode().split("\n\n") if part]
    chunks = [json.loads(part) for part in parts if part != "[DONE]"]
    assert all({name: chunk[name] for name in HEAD} == HEAD for chunk in chunks)
    assert not any("text" in choice for chunk in chunks for choice in chunk["choices"])
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"]]


THINKING = Retelling("</think>", ("reasoning_content", "reasoning"))


def test_a_completion_is_told_as_the_chat_it_is_the_rest_of() -> None:
    told = said(thinks("hm"))
    seam = rest_of(told, THINKING)
    out = [seam.feed(raw(text)) for text in (" so", "</th", "ink>\n", "ye")] + [seam.feed(raw("s", "stop"))]
    assert out[1] == b""
    assert [deltas(one) for one in (out[0], out[2], out[3], out[4])] == [
        [{"reasoning_content": " so", "reasoning": " so"}],
        [{"content": "\n"}],
        [{"content": "ye"}],
        [{"content": "s"}],
    ]
    assert (told.thoughts, told.text, told.finish) == ("hm so", "\nyes", "stop")
    assert len(told.beats) == 5
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}}\n\n'
    last = json.loads(seam.feed(usage + b"data: [DONE]\n\n").split(b"\n\n")[0][6:])
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["prompt_tokens"] == 5


def test_what_was_held_back_is_told_when_the_answer_ends_and_not_when_its_worker_is_lost() -> None:
    told = said(thinks("hm"))
    seam = rest_of(told, THINKING)
    assert seam.feed(raw("</th")) == b""
    assert told.thoughts == "hm"
    assert deltas(seam.feed(raw("", "length")))[0]["reasoning_content"] == "</th"
    assert told.thoughts == "hm</th"


def test_one_chunk_may_end_the_reasoning_and_begin_the_text() -> None:
    seam = rest_of(said(thinks("hm")), THINKING)
    assert deltas(seam.feed(raw("x</think>y"))) == [
        {"reasoning_content": "x", "reasoning": "x", "content": "y"}
    ]


def test_a_stop_string_that_began_before_the_seam_ends_the_answer_also_in_reasoning() -> None:
    told = said(thinks("hm st"))
    seam = rest_of(told, THINKING, stop=["stop"])
    out = seam.feed(raw("o") + raw("p now"))
    assert [delta.get("reasoning_content") for delta in deltas(out)] == ["o", None]
    assert told.finish == "stop"
    assert seam.over


def test_probabilities_are_told_as_a_chat_tells_them() -> None:
    seam = rest_of(said(says("a")), Retelling(top=1))
    given = {
        "tokens": ["é", "b"],
        "token_logprobs": [-0.5, None],
        "top_logprobs": [{"c": -0.1, "é": -0.5}, None],
        "text_offset": [0, 1],
    }
    chunk = json.loads(seam.feed(raw("éb", logprobs=given))[6:])
    first, second = chunk["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "é",
        "logprob": -0.5,
        "bytes": [195, 169],
        "top_logprobs": [{"token": "c", "logprob": -0.1, "bytes": [99]}],
    }
    assert (second["logprob"], second["top_logprobs"]) == (-9999.0, [])
