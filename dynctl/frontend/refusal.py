"""Engines' refusals in the one shape that clients of OpenAI's API parse. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from dynctl.frontend.body import excerpt
from dynctl.protocol.openai import error_body

CODE = "engine_refused"
_TYPE = "invalid_request_error"


def openai_error(body: bytes) -> bytes:
    """`body` itself when it is an OpenAI error, else one made of what it says.

    SGLang and TensorRT-LLM put the fields at the top level, FastAPI says `detail`, others send plain text.
    """
    try:
        told: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return error_body(excerpt(body.decode("utf-8", "replace").strip()) or "refused", _TYPE, code=CODE)
    if not isinstance(told, dict):
        return error_body(_words(told), _TYPE, code=CODE)
    if isinstance(told.get("error"), dict):
        return body
    said = next((told[name] for name in ("message", "detail", "error") if told.get(name)), told)
    kind, param = told.get("type"), told.get("param")
    return error_body(
        _words(said),
        kind if isinstance(kind, str) else _TYPE,
        code=CODE,
        param=param if isinstance(param, str) else None,
    )


def _words(value: object) -> str:
    return value if isinstance(value, str) else excerpt(msgspec.json.encode(value).decode())
