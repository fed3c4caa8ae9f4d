from __future__ import annotations

import msgspec
import pytest

from dynctl.frontend.refusal import openai_error


def test_an_openai_error_is_passed_on_byte_for_byte() -> None:
    told = b'{"error" : {"message":"no","type":"BadRequestError","param":null,"code":400}}'
    assert openai_error(told) is told


@pytest.mark.parametrize(
    ("told", "message", "kind", "param"),
    [
        (b'{"detail":"Not Found"}', "Not Found", "invalid_request_error", None),
        (b'{"detail":[{"loc":["n"]}]}', '[{"loc":["n"]}]', "invalid_request_error", None),
        (
            b'{"object":"error","message":"too long","type":"BadRequestError","param":"n","code":400}',
            "too long",
            "BadRequestError",
            "n",
        ),
        (b'{"error":"plain words"}', "plain words", "invalid_request_error", None),
        (b'{"type":5}', '{"type":5}', "invalid_request_error", None),
        (b"[1]", "[1]", "invalid_request_error", None),
        (b"<html>no\xff</html>", "<html>no\ufffd</html>", "invalid_request_error", None),
        (b"", "refused", "invalid_request_error", None),
    ],
)
def test_other_refusals_get_openais_shape(told: bytes, message: str, kind: str, param: str | None) -> None:
    error = msgspec.json.decode(openai_error(told))["error"]
    assert error == {"message": message, "type": kind, "param": param, "code": "engine_refused"}


def test_a_refusal_of_any_length_is_cut() -> None:
    assert len(openai_error(b"x" * 1_000_000)) < 1000
