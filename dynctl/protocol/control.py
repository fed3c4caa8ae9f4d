"""The envelope of request/answer over ZeroMQ: one call, one reply, matched by id."""

from __future__ import annotations

import msgspec


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """`op` names what is asked ("registry.renew", "kv.sync", "controller.status"); `body` is its msgpack."""

    id: int
    op: str
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """Either `body` (msgpack of the op's answer), or an error: its stable kind, message, where, hint."""

    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")
    error: str = ""
    message: str = ""
    where: str = ""
    hint: str = ""
