"""What a pre-tokeniser's regular expression can do with a space that follows something else. Pure.

Asked of a pattern: for a text "…a …" (any character that is no space, then a space), are the matches in it
those of "…a" followed by those of " …"? They are when no match holds such a character directly before a
space, and nothing looks past that place in a way that tells a space from the text's end. Read are the parts
of Oniguruma's language that published tokenizers use; whatever is not understood counts as "no".
"""

from __future__ import annotations

import string
from dataclasses import dataclass

OTHER = "\x80"
"""Stands for every character outside printable ASCII that is no white space."""
_LETTERS = frozenset(string.ascii_letters)
_DIGITS = frozenset(string.digits)
_SYMBOLS = frozenset("$+<=>^`|~")
_MARKS = frozenset(string.punctuation) - _SYMBOLS
_PRINTED = _LETTERS | _DIGITS | _SYMBOLS | _MARKS
_WORDS = _PRINTED | {OTHER}
_SPACE = frozenset(" ")
_ALL = _WORDS | _SPACE
_NONE: frozenset[str] = frozenset()
_OTHER = frozenset(OTHER)
_PROPERTIES = {
    "L": _LETTERS,
    "Lu": frozenset(string.ascii_uppercase),
    "Ll": frozenset(string.ascii_lowercase),
    "N": _DIGITS,
    "Nd": _DIGITS,
    "P": _MARKS,
    "S": _SYMBOLS,
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn", "Mc", "Nl", "No", "So", "Han"), _NONE),
}
"""ASCII characters that have it."""
_CLASSES: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "s": (_SPACE, _SPACE),
    "S": (_WORDS, _WORDS),
    "w": (_LETTERS | _DIGITS | {"_", OTHER}, _LETTERS | _DIGITS | {"_"}),
    "W": (_ALL - _LETTERS - _DIGITS - {"_"}, _ALL - _LETTERS - _DIGITS - {"_", OTHER}),
    "d": (_DIGITS | _OTHER, _DIGITS),
    "D": (_ALL - _DIGITS, _ALL - _DIGITS - _OTHER),
}
_PLAIN_ESCAPES = frozenset("rntfv")
_NOT_TAKEN = frozenset("^$")


class _NotUnderstood(Exception):
    """The pattern has something this reader does not know."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """What matches of a part can begin and end with, whether it can be empty, whether it can hold "a "."""

    first: frozenset[str]
    last: frozenset[str]
    empty: bool
    crosses: bool

    def then(self, after: _Shape) -> _Shape:
        """This part followed by `after`."""
        return _Shape(
            self.first | after.first if self.empty else self.first,
            self.last | after.last if after.empty else after.last,
            self.empty and after.empty,
            self.crosses or after.crosses or _meet(self, after),
        )

    def either(self, other: _Shape) -> _Shape:
        """This part or `other`."""
        return _Shape(
            self.first | other.first,
            self.last | other.last,
            self.empty or other.empty,
            self.crosses or other.crosses,
        )


_EMPTY = _Shape(_NONE, _NONE, True, False)


def _meet(left: _Shape, right: _Shape) -> bool:
    return bool(left.last & _WORDS) and " " in right.first


def keeps_apart(pattern: str) -> bool:
    """Whether a text may be cut before a space, if none is before that, for each part to be matched alone."""
    reader = _Reader(pattern)
    try:
        shape = reader.alternatives()
        return reader.at_end and not shape.crosses
    except (_NotUnderstood, IndexError, RecursionError):
        return False


class _Reader:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._text = pattern
        self._at = 0

    @property
    def at_end(self) -> bool:
        """Whether all of the pattern was read."""
        return self._at == len(self._text)

    def alternatives(self) -> _Shape:
        """Up to a closing parenthesis or the end."""
        shape = self._sequence()
        while self._take("|"):
            shape = shape.either(self._sequence())
        return shape

    def _take(self, expected: str) -> bool:
        if self._text.startswith(expected, self._at):
            self._at += len(expected)
            return True
        return False

    def _next(self) -> str:
        self._at += 1
        return self._text[self._at - 1]

    def _sequence(self) -> _Shape:
        shape = _EMPTY
        while not self.at_end and self._text[self._at] not in "|)":
            shape = shape.then(self._quantified(self._atom()))
        return shape

    def _quantified(self, shape: _Shape) -> _Shape:
        while not self.at_end and self._text[self._at] in "?*+{":
            mark = self._next()
            least, most = self._braces() if mark == "{" else {"?": (0, 1), "*": (0, 2), "+": (1, 2)}[mark]
            crosses = shape.crosses or (most > 1 and _meet(shape, shape))
            shape = _Shape(shape.first, shape.last, shape.empty or least == 0, crosses)
        return shape

    def _braces(self) -> tuple[int, int]:
        """`m}`, `m,}`, `,n}` or `m,n}`: the bounds, the upper one capped at 2."""
        end = self._text.index("}", self._at) if "}" in self._text[self._at :] else -1
        least, comma, most = self._text[self._at : end].partition(",")
        if end < 0 or not (least + most).isdecimal():
            raise _NotUnderstood
        self._at = end + 1
        low = int(least or 0)
        return low, min(2, int(most)) if most else 2 if comma else min(2, low)

    def _atom(self) -> _Shape:
        mark = self._next()
        if mark == "(":
            return self._group()
        if mark == "[":
            return _one(self._class()[0])
        if mark == "\\":
            return _one(self._escape()[0])
        if mark == ".":
            return _one(_ALL)
        if mark in _NOT_TAKEN:
            raise _NotUnderstood
        return _one(_literal(mark))

    def _group(self) -> _Shape:
        ahead = False
        if self._take("?"):
            if self._take("=") or self._take("!"):
                ahead = True
            elif not (self._take(":") or self._take("i:") or self._take(">")):
                raise _NotUnderstood
        shape = self.alternatives()
        if not self._take(")"):
            raise _NotUnderstood
        if not ahead:
            return shape
        # What looks ahead must find nothing at a space, as it finds nothing at the text's end.
        if shape.crosses or shape.empty or " " in shape.first:
            raise _NotUnderstood
        return _EMPTY

    def _class(self) -> tuple[frozenset[str], frozenset[str]]:
        """After `[`: the characters that may be in it, and those that surely are."""
        negated = self._take("^")
        may, must = _NONE, _NONE
        while not self._take("]"):
            if self._text.startswith("&&", self._at):
                raise _NotUnderstood
            mark = self._next()
            if mark == "[":
                if self._text[self._at] == ":":
                    raise _NotUnderstood
                one = self._class()
            elif mark == "\\":
                one = self._escape()
            else:
                one = self._range(mark)
            may, must = may | one[0], must | one[1]
        return (_ALL - must, _ALL - may) if negated else (may, must)

    def _range(self, low: str) -> tuple[frozenset[str], frozenset[str]]:
        if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
            self._at += 1
            high = self._next()
            if high in "\\[" or high < low:
                raise _NotUnderstood
            inside = frozenset(c for c in _PRINTED | _SPACE if low <= c <= high)
            return (inside | {OTHER} if high > "~" or low < " " else inside), inside
        found = _literal(low)
        return found, frozenset(low) & _ALL

    def _escape(self) -> tuple[frozenset[str], frozenset[str]]:
        mark = self._next()
        if mark in _CLASSES:
            return _CLASSES[mark]
        if mark in "pP":
            return self._property(negated=mark == "P")
        if mark in _PLAIN_ESCAPES:
            return _NONE, _NONE
        if mark.isalnum():  # an anchor, a back reference, a code point: not needed so far
            raise _NotUnderstood
        return _literal(mark), frozenset(mark) & _ALL

    def _property(self, *, negated: bool) -> tuple[frozenset[str], frozenset[str]]:
        if not self._take("{"):
            raise _NotUnderstood
        end = self._text.index("}", self._at) if "}" in self._text[self._at :] else -1
        name = self._text[self._at : end]
        self._at = end + 1
        if end >= 0 and name in ("Z", "Zs"):
            may, must = _SPACE, _SPACE
        elif end >= 0 and name in _PROPERTIES:
            may, must = _PROPERTIES[name] | _OTHER, _PROPERTIES[name]
        else:
            raise _NotUnderstood
        return (_ALL - must, _ALL - may) if negated else (may, must)


def _one(characters: frozenset[str]) -> _Shape:
    """One character out of `characters`."""
    return _Shape(characters, characters, False, False)


def _literal(character: str) -> frozenset[str]:
    """A character in both cases: a flag may ask for either."""
    return (frozenset((character, character.swapcase())) & _ALL) or _OTHER
