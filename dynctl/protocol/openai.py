"""The error body of OpenAI's HTTP API, as clients of that API parse it."""

from __future__ import annotations

import msgspec


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """`type` is stable and documented; `code` is the finer stable name; `param` the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The whole body."""

    error: ErrorDetail


def error_body(message: str, kind: str, *, code: str | None = None, param: str | None = None) -> bytes:
    """JSON bytes of an OpenAI error."""
    return msgspec.json.encode(
        ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))
    )
