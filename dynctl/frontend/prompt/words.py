"""Tokens of words seen before: a text of common words is put together, not tokenised.

For tokenizers of which `cuts` can show that a space between two letters is a safe place, a text is the row of
what lies between such spaces. What the library makes of each is kept, for as many as there is room.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from dynctl.kv.hashing import pack_tokens

Tokenise = Callable[[list[str]], list[list[int]]]
"""Texts to the token ids of each, by itself and with no special tokens added."""
MOST_WORDS = 100_000
_LONGEST = 40
_FEW, _MOST_NEW, _LEAST_NEW = 4, 4096, 256
"""Where not even three of four words are known, at most `_LEAST_NEW` are learnt at a time, and what has
others is tokenised as a whole: a word by itself costs more than in its text.
"""


class Words:
    """`space` finds the spaces to cut at. May be used from several threads."""

    def __init__(self, tokenise: Tokenise, space: re.Pattern[str], most: int = MOST_WORDS) -> None:
        self._tokenise = tokenise
        self._split = space.split
        self._most = most
        self._known: dict[str, bytes] = {}
        self._plain: dict[str, bytes] = {}
        """Of the known those of one space and a word that a space may be cut at after: by that word."""

    def tokens(self, texts: list[str]) -> list[bytes]:
        """The packed token ids of each text."""
        try:
            return [self._quick(text) for text in texts]
        except KeyError:
            return self._thorough(texts)

    def _quick(self, text: str) -> bytes:
        """Of a text of known plain words, which any space may be cut at. Raises KeyError for another."""
        words = iter(text.split(" "))
        first = next(words)
        return b"".join((self._known[first] if first else b"", *map(self._plain.__getitem__, words)))

    def _thorough(self, texts: list[str]) -> list[bytes]:
        rows = [self._row(text) for text in texts]
        known = self._known
        try:
            return [b"".join(map(known.__getitem__, row)) for row in rows]
        except KeyError:
            new = list(dict.fromkeys(part for row in rows for part in row if part not in known))
        few = len(new) * _FEW <= sum(map(len, rows))
        learnt = new[: _MOST_NEW if few else _LEAST_NEW]
        made = dict(zip(learnt, map(pack_tokens, self._tokenise(learnt)), strict=True))
        self._keep(made)
        return self._joined(texts, rows, known, made)

    def _joined(
        self, texts: list[str], rows: list[list[str]], known: dict[str, bytes], made: dict[str, bytes]
    ) -> list[bytes]:
        """Rows of known words put together; the texts of the others as wholes."""
        found: list[bytes | None] = []
        for row in rows:
            try:
                found.append(b"".join([known[part] if part in known else made[part] for part in row]))
            except KeyError:
                found.append(None)
        rest = self._tokenise([text for text, tokens in zip(texts, found, strict=True) if tokens is None])
        others = iter(rest)
        return [pack_tokens(next(others)) if tokens is None else tokens for tokens in found]

    def _row(self, text: str) -> list[str]:
        """The parts of a text, each but the first with the space it was cut at."""
        first, *others = self._split(text)
        return [first, *[" " + word for word in others]]

    def _keep(self, made: dict[str, bytes]) -> None:
        """Nobody sees a word vanish: when there are too many, a new dict is begun."""
        kept = {part: tokens for part, tokens in made.items() if len(part) <= _LONGEST}
        if len(self._known) + len(kept) > self._most:
            self._known, self._plain = {}, {}
        self._known.update(kept)
        for part, tokens in kept.items():
            if part.startswith(" ") and self._split(part[1:] + " ") == [part[1:], ""]:
                self._plain[part[1:]] = tokens
