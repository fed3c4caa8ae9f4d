"""Images in chats: what vLLM makes of them in prompts and in block identity. Pure.

An image is known by the `uuid` of its part, or else by a digest of what is in it. How many tokens it takes is
the engine's own to know: here a number that depends on nothing but the image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynctl.mocker.blocks import Media

LEAST_TOKENS, MOST_TOKENS = 24, 96


@dataclass(frozen=True, slots=True)
class Picture:
    """One image: the name it is known by, and the tokens it takes."""

    name: str
    tokens: int


def pictures(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The images of a chat, in order."""
    return [_picture(part) for message in messages for part in _image_parts(message.get("content"))]


def _image_parts(content: object) -> Iterator[Mapping[str, Any]]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and part.get("type") == "image_url":
            yield part


def _picture(part: Mapping[str, Any]) -> Picture:
    given = part.get("image_url")
    url = given.get("url") if isinstance(given, dict) else given
    digest = hashlib.sha256(str(url).encode()).hexdigest()
    name = part.get("uuid")
    size = LEAST_TOKENS + int(digest[:8], 16) % (MOST_TOKENS - LEAST_TOKENS)
    return Picture(digest if name is None else str(name), size)


def placed(
    tokens: Sequence[int], image_token: int, shown: Sequence[Picture]
) -> tuple[list[int], tuple[Media, ...]]:
    """The prompt with as many placeholders for each image as it takes, and where these are.

    There must be one `image_token` for each image.
    """
    out: list[int] = []
    media: list[Media] = []
    images = iter(shown)
    for token in tokens:
        if token != image_token:
            out.append(token)
            continue
        image = next(images)
        media.append(Media(image.name, len(out), len(out) + image.tokens))
        out += [image_token] * image.tokens
    return out, tuple(media)
