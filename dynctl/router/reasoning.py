"""The marks between which a model reasons, and raw text taken apart at them. Pure.

Marks are the model's own: two added tokens of its tokenizer, else two texts of its chat template, that are
written alike but for a slash and speak of thinking (`<think>` and `</think>`, `[THINK]` and `[/THINK]`,
`<seed:think>` and `</seed:think>`). Where there is not exactly one such pair, none is known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CLOSING = re.compile(
    r"([<\[◁«]\|?)/((?:\w+:)?(?:think|thinking|thought|thoughts|reason|reasoning))(\|?[>\]▷»])", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Marks:
    """`hidden`: engines leave the closing mark out of texts unless asked for special tokens; `specials`: the
    texts of all special tokens but the marks.
    """

    opening: str
    closing: str
    hidden: bool = False
    specials: tuple[str, ...] = ()


def marks_of(added: Mapping[str, bool], template: str) -> Marks | None:
    """A model's marks. `added`: its tokenizer's added tokens, and whether each is a special one."""
    listed = _pairs("\n".join(added))
    own = {pair for pair in listed if pair[0] in added and pair[1] in added}
    written = _pairs(template)
    found = own & written if len(own) > 1 else own or written
    if len(found) != 1:
        return None
    ((opening, closing),) = found
    specials = tuple(text for text, special in added.items() if special and text not in (opening, closing))
    return Marks(opening, closing, added.get(closing, False), specials)


def _pairs(text: str) -> set[tuple[str, str]]:
    found = {(match.expand(r"\1\2\3"), match.group()) for match in _CLOSING.finditer(text)}
    return {(opening, closing) for opening, closing in found if opening in text}


class Splitter:
    """Takes a text that begins inside reasoning (`open`) or after it, piece by piece.

    What may be the beginning of a mark is held back until the next piece shows whether it is one.
    `leaves_out`: texts that are dropped wherever they are.
    """

    def __init__(self, closing: str, leaves_out: tuple[str, ...] = ()) -> None:
        self.open = bool(closing)
        self._closing = closing
        self._leaves_out = tuple(sorted(leaves_out, key=len, reverse=True))
        self._held = ""

    def take(self, text: str) -> tuple[str, str]:
        """The reasoning and the text that are known by now."""
        self._held += text
        thoughts: list[str] = []
        texts: list[str] = []
        while self._held:
            at, mark = self._next()
            (thoughts if self.open else texts).append(self._held[:at])
            self._held = self._held[at + len(mark) :]
            if not mark:
                break
            if mark == self._closing:
                self.open = False
        return "".join(thoughts), "".join(texts)

    def rest(self) -> tuple[str, str]:
        """What was held back, at the text's end."""
        held, self._held = self._held, ""
        return (held, "") if self.open else ("", held)

    def _next(self) -> tuple[int, str]:
        """Where the next mark is, and which; else how much is surely no part of one, and nothing."""
        marks = ((self._closing,) if self.open else ()) + self._leaves_out
        found = [(at, -len(mark), mark) for mark in marks if (at := self._held.find(mark)) >= 0]
        if found:
            at, _, mark = min(found)
            # It may be the beginning of a longer one.
            longer = any(len(other) > len(mark) and other.startswith(self._held[at:]) for other in marks)
            return at, "" if longer else mark
        longest = max(map(len, marks), default=1) - 1
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(mark.startswith(self._held[start:]) for mark in marks):
                return start, ""
        return len(self._held), ""
