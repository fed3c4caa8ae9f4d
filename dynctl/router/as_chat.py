"""A raw completion's choices as those of the chat that it is the rest of. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynctl.router.reasoning import Splitter

Json = dict[str, Any]
_UNLIKELY = -9999.0
"""The logarithm of the probability of a token for which none was given, as OpenAI's API has it."""


@dataclass(frozen=True, slots=True)
class Retelling:
    """How the rest of a chat is told that was asked for as a completion.

    `closing`: the mark that ends the reasoning which is going on, "" = none is. `fields`: those of a chunk
    that carry reasoning. `leaves_out`: texts of special tokens that were only asked for to see the mark.
    `top`: how many alternatives the client wants with each token's probability.
    """

    closing: str = ""
    fields: Sequence[str] = ()
    leaves_out: tuple[str, ...] = ()
    top: int = 0


class AsChat:
    """Writes the choices of one leg anew, in their order."""

    def __init__(self, how: Retelling) -> None:
        self._how = how
        self._splitter = Splitter(how.closing, how.leaves_out)

    def write(self, choice: Json) -> None:
        """Make a completion's choice a chat's."""
        thought, text = self._splitter.take(choice.pop("text", None) or "")
        if choice.get("finish_reason"):
            last = self._splitter.rest()
            thought, text = thought + last[0], text + last[1]
        delta: Json = dict.fromkeys(self._how.fields, thought) if thought else {}
        if text or not thought:
            delta["content"] = text
        choice["delta"] = delta
        if choice.get("logprobs"):
            choice["logprobs"] = _logprobs(choice["logprobs"], self._how.top)


def _logprobs(given: Json, top: int) -> Json:
    tokens = given.get("tokens") or []
    chances = given.get("token_logprobs") or [None] * len(tokens)
    others = given.get("top_logprobs") or [None] * len(tokens)
    return {
        "content": [
            {**_token(token, chance), "top_logprobs": _best(other or {}, top)}
            for token, chance, other in zip(tokens, chances, others, strict=False)
        ]
    }


def _best(chances: dict[str, float | None], top: int) -> list[Json]:
    ranked = sorted(chances.items(), key=lambda pair: _UNLIKELY if pair[1] is None else pair[1], reverse=True)
    return [_token(token, chance) for token, chance in ranked[:top]]


def _token(token: str, chance: float | None) -> Json:
    return {
        "token": token,
        "logprob": _UNLIKELY if chance is None else chance,
        "bytes": list(token.encode("utf-8", "replace")),
    }
