from __future__ import annotations

import pytest

from dynctl.errors import ContextTooLong, ModelNotFound, RequestError
from dynctl.frontend.admission import Models, asked_tokens, check_context
from dynctl.frontend.body import Body
from dynctl.protocol.instances import Instance, ModelCard
from tests.workers import worker_instance


def instance(card: ModelCard | None) -> Instance:
    return worker_instance(model=card)


def test_models_follow_what_workers_report() -> None:
    models = Models(ModelCard(name="m", max_model_len=100, adapters=["a"]))
    assert models.max_model_len == 100
    models.members_changed(
        [
            instance(ModelCard(name="m", max_model_len=80, adapters=["b", "m"])),
            instance(ModelCard(name="m", max_model_len=90)),
            instance(ModelCard(name="m")),
            instance(None),
        ]
    )
    assert models.max_model_len == 80
    assert models.names() == ["m", "a", "b"]
    assert (models.adapter("m"), models.adapter("b")) == ("", "b")
    models.members_changed([])
    assert models.max_model_len == 100
    with pytest.raises(ModelNotFound) as caught:
        models.adapter("b")
    assert "m, a" in caught.value.hint


def test_asked_tokens_are_of_the_newer_field_first() -> None:
    assert asked_tokens(Body.parse(b'{"max_tokens": 5, "max_completion_tokens": 3}')) == 3
    assert asked_tokens(Body.parse(b'{"max_tokens": 0}')) == 0
    assert asked_tokens(Body.parse(b'{"max_tokens": null}')) is None
    for wrong in (b'{"max_tokens": -1}', b'{"max_completion_tokens": "x"}', b'{"max_tokens": 1.5}'):
        with pytest.raises(RequestError):
            asked_tokens(Body.parse(wrong))


def test_what_fits_is_let_in_and_so_is_the_unknown() -> None:
    check_context(90, 10, 100)
    check_context(99, None, 100)
    check_context(0, 1000, 100)
    check_context(1000, None, 0)


@pytest.mark.parametrize(
    ("tokens", "asked", "told"),
    [
        (100, None, "your messages resulted in 100 tokens"),
        (101, 1, "your messages resulted in 101 tokens"),
        (91, 10, "you requested 101 tokens (91 in the messages, 10 in the completion)"),
    ],
)
def test_what_does_not_fit_is_told_with_its_numbers(tokens: int, asked: int | None, told: str) -> None:
    with pytest.raises(ContextTooLong) as caught:
        check_context(tokens, asked, 100)
    assert "maximum context length is 100 tokens" in caught.value.message
    assert told in caught.value.message


def test_an_unknown_model_of_any_length_is_told_in_a_short_message() -> None:
    with pytest.raises(ModelNotFound) as caught:
        Models(ModelCard(name="m")).adapter("x" * 1_000_000)
    assert len(caught.value.message) < 300
