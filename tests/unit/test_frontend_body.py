from __future__ import annotations

import json

import pytest

from dynctl.errors import ContextTooLong, RequestError
from dynctl.frontend.admission import Models
from dynctl.frontend.body import Body, encode, large_batch, messages, prompt, tokens_at_least
from dynctl.frontend.call import Endpoint, read_form
from dynctl.protocol.instances import ModelCard


def test_broken_json_is_a_request_error() -> None:
    for data in (b"", b"{", b'{"a": }', b'{"a": NaN}', b"\xff\xfe", b'{"a":1} x'):
        with pytest.raises(RequestError, match="not JSON"):
            Body.parse(data)


def test_json_that_is_no_object_is_a_request_error() -> None:
    for data in (b"[]", b"1", b'"x"', b"null"):
        with pytest.raises(RequestError, match="must be a JSON object"):
            Body.parse(data)


def test_fields_are_read_by_type_and_the_error_names_the_field() -> None:
    body = Body.parse(b'{"model": "m", "stream": true, "n": 2, "max_tokens": null}')
    assert body.get("model", str) == "m"
    assert body.get("stream", bool) is True
    assert body.get("max_tokens", int) is None
    assert body.get("absent", int) is None
    assert body.has("n")
    assert not body.has("max_tokens")
    with pytest.raises(RequestError, match="`model` must be a whole number") as caught:
        body.get("model", int)
    assert caught.value.where == "model"


def test_untouched_fields_stay_verbatim_when_one_is_taken_out() -> None:
    data = b'{"x": 1.50e3, "kv_transfer_params": {"a": 1}, "u": "\\u00e9",  "nested": {"b" :[1 , 2]}}'
    kept = Body.parse(data).without(["kv_transfer_params", "other"])
    assert kept.original == b'{"x":1.50e3,"u":"\\u00e9","nested":{"b" :[1 , 2]}}'
    assert not kept.has("kv_transfer_params")


def test_a_field_whose_name_is_written_with_escapes_is_taken_out_too() -> None:
    kept = Body.parse(b'{"kv_transfer\\u005fparams": 1, "kv_transfer_params": 2, "a": 3}').without(
        ["kv_transfer_params"]
    )
    assert kept.original == b'{"a":3}'


def test_nothing_to_take_out_keeps_the_original_bytes() -> None:
    body = Body.parse(b'{ "a" : 1 }')
    assert body.without(["b"]) is body


def test_an_opened_body_can_be_changed_without_changing_the_request() -> None:
    body = Body.parse(b'{"a": 1.50, "max_tokens": 5, "tools": [ 1 ]}')
    opened = body.opened()
    opened["max_tokens"] = 1
    assert encode(opened) == b'{"a":1.50,"max_tokens":1,"tools":[ 1 ]}'
    assert body.get("max_tokens", int) == 5


def test_an_opened_body_shows_what_contracts_look_at() -> None:
    data = (
        b'{"n": 2, "echo": false, "user": null, "prompt": ["a", "b"], "messages": [], "prompt_embeds": "x"}'
    )
    opened = Body.parse(data).opened()
    assert opened["n"] == 2
    assert opened["echo"] is False
    assert opened["user"] is None
    assert opened["prompt"] == ["a", "b"]
    assert bytes(opened["messages"]) == b"[]"
    assert bytes(opened["prompt_embeds"]) == b'"x"'


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"{}", "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": null}', "messages"),
        (b'{"messages": "hi"}', "messages"),
        (b'{"messages": [1]}', "messages"),
        (b'{"messages": [{"role": "user"}, {"content": "x"}]}', "messages[1].role"),
        (b'{"messages": [{"role": 1}]}', "messages[0].role"),
    ],
)
def test_bad_messages_are_named(data: bytes, where: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages(Body.parse(data))
    assert caught.value.where == where


def test_prompt_forms() -> None:
    assert prompt(Body.parse(b'{"prompt": "hi"}')) == "hi"
    assert prompt(Body.parse(b'{"prompt": [1, 2]}')) == [1, 2]
    assert prompt(Body.parse(b'{"prompt": ["a", "b"]}')) == ["a", "b"]
    assert prompt(Body.parse(b'{"prompt": [[1], [2]]}')) == [[1], [2]]
    assert prompt(Body.parse(b"{}")) is None
    for wrong in (b'{"prompt": 1}', b'{"prompt": {"a": 1}}', b'{"prompt": [[1, "a"]]}'):
        with pytest.raises(RequestError) as caught:
            prompt(Body.parse(wrong))
        assert caught.value.where == "prompt"


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_nested_too_deeply_is_a_request_error(opening: bytes) -> None:
    with pytest.raises(RequestError, match="nested too deeply"):
        Body.parse(b'{"x":' + opening * 100_000)


def test_megabytes_of_token_ids_are_counted_and_told_apart_without_reading_them() -> None:
    ids = ",".join(["12345"] * 100_000)

    def body(prompt: str) -> Body:
        return Body.parse(f'{{"prompt": {prompt}}}'.encode())

    assert tokens_at_least(body(f"[ {ids}]")) == 100_000
    assert tokens_at_least(body(f"[[{ids}]]")) == 0
    assert tokens_at_least(body("[1,2,3]")) == 0
    assert tokens_at_least(body(f'"{ids}"')) == 0
    assert large_batch(body(f"[[{ids}],[1]]"))
    assert not large_batch(body(f"[[{ids}]]"))
    assert not large_batch(body("[[1],[2]]"))
    one = body("[1,2,3]")
    assert prompt(one) is prompt(one)


def test_token_ids_that_cannot_fit_are_refused_before_they_are_read() -> None:
    data = b'{"model": "m", "prompt": [1,' + b"1," * 100_000 + b"1]}"
    endpoint = Endpoint("/v1/completions", "completions", "completions")
    models = Models(ModelCard(name="m", max_model_len=4096))
    with pytest.raises(ContextTooLong) as caught:
        read_form(endpoint, Body.parse(data), models, frozenset())
    assert caught.value.where == "prompt"


def test_more_messages_than_tokens_fit_are_refused_before_they_are_read() -> None:
    data = b'{"model": "m", "messages": [' + b"{}," * 100_000 + b"{}]}"
    endpoint = Endpoint("/v1/chat/completions", "chat_completions", "chat")
    with pytest.raises(ContextTooLong):
        read_form(endpoint, Body.parse(data), Models(ModelCard(name="m", max_model_len=4096)), frozenset())
    with pytest.raises(RequestError, match="role"):
        read_form(endpoint, Body.parse(data), Models(ModelCard(name="m")), frozenset())


def test_a_body_of_endless_fields_is_refused() -> None:
    data = json.dumps({str(number): 1 for number in range(1025)}).encode()
    with pytest.raises(RequestError, match="1025 fields"):
        Body.parse(data)
