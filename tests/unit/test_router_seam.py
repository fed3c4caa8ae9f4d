from __future__ import annotations

import json
from typing import Any

import pytest

from dynctl.router.said import Said
from dynctl.router.seam import Joint, Seam, Taken, ending
from dynctl.router.spoken import Made

HEAD = {"id": "x-1", "object": "o", "created": 1, "model": "m"}


def event(choices: Any, **more: Any) -> bytes:
    chunk = {"id": "x-2", "object": "o", "created": 2, "model": "m", "choices": choices, **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(said: str, **choice: Any) -> bytes:
    return event([{"index": 0, "text": said, "finish_reason": None, **choice}])


def delta(**fields: Any) -> bytes:
    return event([{"index": 0, "delta": fields, "finish_reason": None}])


def begun(told: str) -> Said:
    said = Said()
    said.take({**HEAD, "choices": [{"index": 0, "delta": {"role": "assistant", "content": told}}]})
    return said


def chunks(out: bytes) -> list[Any]:
    parts = [part.removeprefix("data: ") for part in out.decode().split("\n\n") if part]
    return [part if part == "[DONE]" else json.loads(part) for part in parts]


def seam(told: str = "ab", **joint: Any) -> Seam:
    given: dict[str, Any] = {"kind": "completions", "prompt_tokens": 5, "spoken": 2, **joint}
    return Seam(begun(told), Joint(**given))


def test_chunks_go_on_under_the_first_ones_name() -> None:
    (chunk,) = chunks(seam().feed(text("c", prompt_token_ids=[1])))
    assert {name: chunk[name] for name in HEAD} == HEAD
    assert chunk["choices"] == [{"index": 0, "text": "c", "finish_reason": None}]


def test_a_second_opening_is_left_out_and_a_role_with_text_loses_its_role() -> None:
    joined = seam(kind="chat")
    assert joined.feed(delta(role="assistant", content="")) == b""
    (chunk,) = chunks(joined.feed(delta(role="assistant", content="c")))
    assert chunk["choices"][0]["delta"] == {"content": "c"}


def test_what_a_chunk_says_beside_text_is_kept() -> None:
    joined = seam(kind="chat")
    kept: list[dict[str, Any]] = [{"logprobs": {"content": []}}, {"token_ids": [3]}]
    for fields in kept:
        assert joined.feed(event([{"index": 0, "delta": {}, "finish_reason": None, **fields}]))
    assert joined.feed(delta(tool_calls=[{"index": 0}]))
    assert joined.feed(b": ping\n\n") == b": ping\n\n"
    assert joined.feed(b"data: [1]\n\n") == b"data: [1]\n\n"
    assert joined.feed(b"data: {x\n\n") == b"data: {x\n\n"


def test_white_space_said_before_is_not_said_again() -> None:
    joined = seam("a \n", kind="chat", drop=" \n")
    assert joined.feed(delta(content=" ")) == b""
    (chunk,) = chunks(joined.feed(delta(content="\n\nb")))
    assert chunk["choices"][0]["delta"]["content"] == "\nb"
    other = seam("a \n", kind="chat", drop=" \n")
    assert chunks(other.feed(delta(content="b ")))[0]["choices"][0]["delta"]["content"] == "b "
    assert chunks(other.feed(delta(content=" ")))[0]["choices"][0]["delta"]["content"] == " "


def test_usage_is_the_whole_of_all_legs() -> None:
    told = {
        "prompt_tokens": 8,
        "completion_tokens": 4,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 7},
    }
    (chunk,) = chunks(seam().feed(event([], usage=told)))
    assert chunk["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    (chunk,) = chunks(seam(prompt_tokens=0).feed(event([], usage={**told, "prompt_tokens_details": None})))
    assert (chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"]) == (6, 6)


def test_text_offsets_go_on_from_what_was_said() -> None:
    (chunk,) = chunks(seam("abc").feed(text("de", logprobs={"text_offset": [0, 1], "tokens": ["d", "e"]})))
    assert chunk["choices"][0]["logprobs"]["text_offset"] == [3, 4]


@pytest.mark.parametrize(
    "lost",
    [
        text("", finish_reason="abort"),
        b'data: {"error": {"message": "dead"}}\n\n',
        b'data: {"object": "error", "message": "dead"}\n\n',
        b"data: [DONE]\n\n",
    ],
)
def test_a_leg_that_is_lost_says_so_and_nothing_of_it_reaches_the_client(lost: bytes) -> None:
    joined = seam()
    assert [c["choices"][0]["text"] for c in chunks(joined.feed(text("c") + lost + text("never")))] == ["c"]
    assert joined.lost
    assert not joined.over
    assert joined.feed(text("never")) == b""


def test_the_end_is_told_once() -> None:
    joined = seam()
    out = joined.feed(text("c", finish_reason="stop") + b"data: [DONE]\n\n" + text("never"))
    assert [c if c == "[DONE]" else c["choices"][0]["finish_reason"] for c in chunks(out)] == [
        "stop",
        "[DONE]",
    ]
    assert joined.over


def test_a_stop_string_across_the_seam_ends_the_stream() -> None:
    joined = seam("say st", stops=("stop", "zz"), wants_usage=True)
    out = chunks(joined.feed(text("o") + text("p!", stop_reason=None)))
    assert out[0]["choices"][0]["text"] == "o"
    last = out[1]["choices"][0]
    assert (last["text"], last["finish_reason"], last["stop_reason"]) == ("", "stop", "stop")
    assert out[2]["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert out[3] == "[DONE]"
    assert joined.over


def test_a_stop_string_that_is_to_be_shown_is_shown_to_its_end() -> None:
    joined = seam("say st", stops=("stop",), include_stop=True)
    out = chunks(joined.feed(text("o") + text("p!")))
    assert [chunk["choices"][0]["text"] for chunk in out[:2]] == ["o", "p"]
    assert out[1]["choices"][0]["finish_reason"] == "stop"
    assert "stop_reason" not in out[1]["choices"][0]


def test_a_stop_string_after_the_seam_is_the_engines_to_find() -> None:
    joined = seam("say st", stops=("stop",))
    assert len(chunks(joined.feed(text("ay stop") + text(" stop")))) == 2
    assert not joined.over


def test_a_stop_string_found_in_the_middle_of_what_was_said_is_not_found_again() -> None:
    joined = seam("a stop b", stops=("stop b and more",))
    assert chunks(joined.feed(text(" xx")))[0]["choices"][0]["text"] == " xx"


def test_the_joint_knows_the_prompt_from_the_best_source() -> None:
    said = begun("ab ")
    request: dict[str, Any] = {"stream_options": {"include_usage": True}, "stop": ["x"], "min_tokens": 9}
    joint = Joint.of("chat", request, said, 4, Taken(2, Made.plain(said, trims=True)))
    assert (joint.prompt_tokens, joint.drop, joint.wants_usage, joint.stops) == (4, " ", True, ())
    said.take({"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 1}})
    taken = Taken(2, Made.plain(said, trims=False))
    assert Joint.of("completions", {"stop": "x"}, said, 4, taken).prompt_tokens == 6
    said.prompt_ids = [1, 2, 3]
    joint = Joint.of("completions", {"stop": "x"}, said, 4, taken)
    assert (joint.prompt_tokens, joint.drop, joint.wants_usage, joint.stops) == (3, "", False, ("x",))


def test_what_is_still_owed_at_the_end_is_told_and_no_more() -> None:
    joint = Joint("chat", 5, 2, wants_usage=True)
    said = begun("ab")
    finish, usage, done = chunks(ending(said, joint, "length"))
    assert finish["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 7, "[DONE]")
    assert ending(said, joint, "length") == b""
    said = begun("ab")
    said.finish = "stop"
    assert chunks(ending(said, Joint("completions", 5, 2), "length")) == ["[DONE]"]
    said = begun("ab")
    assert chunks(ending(said, Joint("completions", 5, 2), "length"))[0]["choices"][0]["text"] == ""
