"""Whether a piece of an answer's text is one token of a tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_SPACE, _SPACE = "Ġ", "▁"
"""How byte-level tokenizers write a space, and how the others do."""
_PRINTABLE = (range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))


def known_tokens(tokenizer: Tokenizer) -> Callable[[str], bool]:
    """A question to ask of texts. A tokenizer may be one whose pieces cannot be told from words of a text
    (with a space put before the first): encoding the piece would give more tokens than it was.
    """
    id_of = tokenizer.token_to_id
    if id_of(_BYTE_SPACE) is None:
        return lambda text: id_of(text.replace(" ", _SPACE)) is not None
    letters = _byte_letters()

    def is_token(text: str) -> bool:
        return id_of("".join(map(letters.__getitem__, text.encode("utf-8", "replace")))) is not None

    return is_token


def _byte_letters() -> list[str]:
    """The letter by which byte-level vocabularies write each byte: itself where that can be seen."""
    letters: list[str] = []
    unseen = 0x100
    for byte in range(0x100):
        if any(byte in seen for seen in _PRINTABLE):
            letters.append(chr(byte))
        else:
            letters.append(chr(unseen))
            unseen += 1
    return letters
