"""Words that prompts of a known number of tokens are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from dynctl.errors import ProfileError

_WORD = re.compile("[\u0120\u2581]([a-z]{2,})")
"""A vocabulary entry that is a space and a word, as byte-level and sentencepiece vocabularies write it."""
_MOST = 8192
_LEAST = 64
_COMMON = re.findall(
    r"\w+",
    """the of and to in is that it was for on are as with they be at one have this from or had by but some
    what there we can out other were all your when up use how said an each she which do their time if will
    way about many then them would write like so these her long make thing see him two has look more day
    could go come did number sound no most people my over know water than call first who may down side been
    now find any new work part take get place made live where after back little only round man year came show
    every good me give our under name very through just form much great think say help low line before turn
    cause same mean differ move right boy old too does tell sentence set three want air well also play small
    """,
)


@dataclass(frozen=True, slots=True)
class Words:
    """`words` to choose from, each said after a space, `per_word` tokens each on average; and `around` tokens
    that the server adds to a prompt (its chat template). `exact`: each word is one token of the model.
    """

    words: tuple[str, ...]
    per_word: float = 1.0
    around: int = 0
    exact: bool = False

    def count_for(self, tokens: int) -> int:
        """Words that make a prompt of so many tokens, at least 1."""
        return max(1, round((tokens - self.around) / self.per_word))

    def fitted(self, few: tuple[int, int], many: tuple[int, int]) -> Words:
        """The same, known from two prompts' (words, tokens), the second one longer. Raises ProfileError."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        if not slope > 0:
            raise ProfileError(
                f"the server counts {few[1]} tokens in {few[0]} words and {many[1]} in {many[0]}",
                hint="its usage.prompt_tokens cannot be right",
            )
        per_word = 1.0 if self.exact and abs(slope - 1) < 0.02 else slope
        around = max(0, round(few[1] - few[0] * per_word))
        return replace(self, per_word=per_word, around=around, exact=per_word == 1.0 and self.exact)


COMMON = Words(tuple(_COMMON))
"""English words, each about one token of any model: to be fitted by what the server counts."""


def words_of(tokenizer: Path) -> Words:
    """Words that are one token each, alone and in a row, by a tokenizer.json or the directory it is in.

    Raises ProfileError when it cannot be read or has too few of them.
    """
    # Here, since it is slow to load and only asked for where a model is at hand.
    from tokenizers import Tokenizer

    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise ProfileError("no tokenizer.json is there", where=str(tokenizer))
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ProfileError(f"not a tokenizer: {error}", where=str(file)) from error
    matches = (_WORD.fullmatch(entry) for entry in loaded.get_vocab(with_added_tokens=False))
    found = sorted({match[1] for match in matches if match})[:_MOST]
    encoded = loaded.encode_batch([f" {word}" for word in found], add_special_tokens=False)
    alone = tuple(word for word, one in zip(found, encoded, strict=True) if len(one.ids) == 1)
    row = loaded.encode("".join(f" {word}" for word in alone), add_special_tokens=False)
    if len(alone) < _LEAST or len(row.ids) != len(alone):
        raise ProfileError(f"{len(alone)} of its words are one token each: too few", where=str(file))
    return Words(alone, exact=True)
