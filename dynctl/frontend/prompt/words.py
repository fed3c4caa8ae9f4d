"""Tokens of words seen before: a text of common words is put together, not tokenised.

For tokenizers of which `cuts` can show that a space between two letters is a safe place, a text is the row of
what lies between such spaces, and before marks. What the library makes of each is kept, for as many as there
is room. A word that follows another has the space between them as its first character.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from dynctl.frontend.prompt.cuts import ANY, Cuts, any_of
from dynctl.kv.hashing import pack_tokens
from dynctl.native import load
from dynctl.native.load import WordTable

Tokenise = Callable[[list[str]], list[list[int]]]
"""Texts to the token ids of each, by itself and with no special tokens added."""
MOST_WORDS = 100_000
_LONGEST = 40
_FEW, _MOST_NEW, _LEAST_NEW = 4, 4096, 256
"""Where not even three of four words are known, at most `_LEAST_NEW` are learnt at a time, and what has
others is tokenised as a whole: a word by itself costs more than in its text.
"""


class Words:
    """`cuts` finds the places between words; there must be some. May be used from several threads."""

    def __init__(self, tokenise: Tokenise, cuts: Cuts, most: int = MOST_WORDS) -> None:
        self._tokenise = tokenise
        self._cuts = cuts
        self._split = splitter(cuts)
        self._most = most
        self._known: dict[str, bytes] = {}
        self._table = table(cuts)

    def join(self, texts: Sequence[str]) -> list[bytes | None]:
        """The packed token ids of each text that is made of known words: 50 µs for a thousand of them."""
        join = self._table.join
        return [join(text) for text in texts]

    def tokens(self, texts: Sequence[str]) -> list[bytes]:
        """The packed token ids of each text. What has words that are not known is tokenised."""
        rows = list(map(self._split, texts))
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
        self, texts: Sequence[str], rows: list[list[str]], known: dict[str, bytes], made: dict[str, bytes]
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

    def _keep(self, made: dict[str, bytes]) -> None:
        """Nobody sees a word vanish: when there are too many, all is begun anew."""
        kept = {part: tokens for part, tokens in made.items() if len(part) <= _LONGEST}
        if len(self._known) + len(kept) > self._most:
            self._known, self._table = {}, table(self._cuts)
        self._known.update(kept)
        for part, tokens in kept.items():
            self._table.learn(part, tokens)


class PythonTable:
    """Words and their packed tokens, for texts of which each is known (`native/words.c` is the same)."""

    def __init__(self, cuts: Cuts) -> None:
        self._split = splitter(cuts)
        self._known: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, word: str, tokens: bytes) -> None:
        """From now on, where there is room. A word that is known stays as it is."""
        self._known.setdefault(word, tokens)

    def join(self, text: str) -> bytes | None:
        """The tokens of its words in a row; None when one of them is not known."""
        try:
            return b"".join(map(self._known.__getitem__, self._split(text)))
        except KeyError:
            return None


def splitter(cuts: Cuts) -> Callable[[str], list[str]]:
    """What cuts a text into its words: before each mark, and at each space that is a place."""
    space = re.compile(f" (?<={cuts.before} )").split
    mark = re.compile(any_of(cuts.marks)) if cuts.marks else None

    def row(text: str) -> list[str]:
        first, *others = space(text)
        return [first, *[" " + word for word in others]] if text else []

    def split(text: str) -> list[str]:
        starts = [found.start() for found in mark.finditer(text) if found.start()] if mark is not None else []
        if not starts:
            return row(text)
        ends = [*starts, len(text)]
        return [word for start, end in zip([0, *starts], ends, strict=True) for word in row(text[start:end])]

    return split


def table(cuts: Cuts) -> WordTable:
    """An empty one, compiled where it can be."""
    if load.compiled is None:
        return PythonTable(cuts)
    return load.compiled.WordTable(tuple(mark.encode() for mark in cuts.marks), cuts.before == ANY)
