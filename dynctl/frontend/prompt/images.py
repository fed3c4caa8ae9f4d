"""Images in chat messages: what each is known by, and telling the engine so. Pure.

An engine that takes names for media has them in its KV events and block hashes. The name of an image that
comes in the request itself is a digest of it, made with a secret: whoever could name an image as another one
is named would have the answers to it given to others. What is behind a URL may change, so such an image gets
no name: the engine, which fetches it, hashes what it has got.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial

import msgspec

from dynctl.errors import RequestError
from dynctl.frontend.body import Body, Message, messages

_UNNAMED = "\0"
"""Begins what an image without a name is told apart by: no engine knows it."""
_TYPE = b'"image_url"'
_INLINE = b"data:"
_NAME_CHARS = 32
_Part = dict[str, msgspec.Raw]


def has_images(body: Body) -> bool:
    """Whether there may be images in a chat: microseconds for each hundred kilobytes."""
    return _TYPE in body.original


class ImageNames:
    """Names images in `field` of their content part, the engine's own. `secret`: the deployment's."""

    def __init__(self, field: str, secret: bytes) -> None:
        self._field = field
        self._secret = secret

    def named(self, body: Body) -> Body:
        """The chat with a name for each image that is in it; itself when there is none to be named.

        Names that clients give stay. Raises RequestError as `messages` does, and for a part that is no JSON.
        """
        if not has_images(body):
            return body
        given, names = messages(body), list[str]()
        try:
            found = [_with_images(message, partial(self._name, names)) for message in given]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestError(f"a content part is not readable: {error}", where="messages") from error
        if all(new is old for new, old in zip(found, given, strict=True)):
            body.images = names
            return body
        fields = {**body.fields, "messages": msgspec.Raw(msgspec.json.encode(found))}
        out = Body(msgspec.json.encode(fields), fields)
        out.messages, out.images = found, names
        return out

    def known_by(self, body: Body) -> list[str]:
        """What each image of a chat that was `named` is known by, in order: its name, or one of our own."""
        if body.images is None:
            self.named(body)
        return body.images or []

    def _name(self, names: list[str], part: _Part) -> _Part:
        name = _string(part.get(self._field))
        url, alone = (b"", None) if name else _url(part)
        names.append(name or _UNNAMED + self._digest(url))
        if name is not None or alone is None or not url.startswith(_INLINE):
            return part
        names[-1] = names[-1].removeprefix(_UNNAMED)
        return {**part, "image_url": alone, self._field: msgspec.Raw(msgspec.json.encode(names[-1]))}

    def _digest(self, url: bytes) -> str:
        return hmac.digest(self._secret, url, "sha256").hex()[:_NAME_CHARS]


def _with_images(message: Message, change: Callable[[_Part], _Part]) -> Message:
    """The message with `change` made to its images; itself when that changes nothing."""
    content = message.get("content")
    if content is None or not bytes(content).startswith(b"["):
        return message
    parts = msgspec.json.decode(content, type=list[msgspec.Raw])
    found = [_changed(part, change) for part in parts]
    if all(new is old for new, old in zip(found, parts, strict=True)):
        return message
    return {**message, "content": msgspec.Raw(msgspec.json.encode(found))}


def _changed(raw: msgspec.Raw, change: Callable[[_Part], _Part]) -> msgspec.Raw:
    if not bytes(raw).startswith(b"{"):
        return raw
    part = msgspec.json.decode(raw, type=_Part)
    if _string(part.get("type")) != "image_url":
        return raw
    new = change(part)
    return raw if new is part else msgspec.Raw(msgspec.json.encode(new))


def _url(part: _Part) -> tuple[bytes, msgspec.Raw]:
    """`{"image_url": {"url": ...}}`, or the URL alone; b"" = there is none. With it what says this and no
    other: no key is in it twice, of which an engine might take the other one.
    """
    raw = part.get("image_url", msgspec.Raw(b"null"))
    if not bytes(raw).startswith(b"{"):
        return _bytes(raw), raw
    fields = msgspec.json.decode(raw, type=_Part)
    return _bytes(fields.get("url")), msgspec.Raw(msgspec.json.encode(fields))


def _bytes(raw: msgspec.Raw | None) -> bytes:
    return (_string(raw) or "").encode()


def _string(raw: msgspec.Raw | None) -> str | None:
    """What is a string; None = it is something else, which is not even looked at."""
    if raw is None or not bytes(raw).startswith(b'"'):
        return None
    return msgspec.json.decode(raw, type=str)
