"""Where a text may be cut so that the pieces' tokens, put together, are the tokens of the whole. Pure.

Two kinds of places are known to be safe:

- *Before an added token* (`<|im_end|>`): the library splits a text at these before all else, and treats what
  lies between them apart. Used are tokens whose first character is in no added token but as its first, so
  that each occurrence is one.
- *Before a space that no space is before*, for tokenizers where it can be shown from their files: the
  normaliser works character by character, no pre-tokeniser sees across (`patterns`), and either no entry of a
  BPE vocabulary holds another character directly before a space, so that no merge can cross, or the words
  are separated anyway.

A tokenizer of which less can be shown gets fewer places, at worst none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from dynctl.frontend.prompt.patterns import keeps_apart

CHUNK_CHARS = 512
"""The least length of a piece: short ones cost more to look up than they save."""
_NEAR_CHARS, _WINDOW_CHARS = 256, 64 * 1024
"""What is searched for a place at a time, at first and at most: other threads stand still meanwhile."""
_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase")
_UNTOUCHED = ("Digits", "Punctuation")
_BYTE_SPACE, _WORD_SPACE = "Ġ", "▁"  # how byte-level tokenizers write a space, and how the others do
_BYTE_BLANKS = r"\u0109-\u010d\u011c-\u0120"  # and how byte-level ones write the white space of ASCII
_ENDS_IN_SPACE = re.compile(r"\S\s")
ASCII, ANY = "[!-~]", rf"[^\s{_WORD_SPACE}]"
"""The characters after which a space may be a place: no `▁`, which the space may become and merge with."""


class AddedToken(msgspec.Struct):
    """One of `added_tokens`, as `tokenizer.json` has it."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True


class Model(msgspec.Struct):
    """The part of `model` that matters here. `vocab`: a mapping for BPE, else left alone."""

    type: str = ""
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    vocab: msgspec.Raw = msgspec.Raw(b"{}")


class Layout(msgspec.Struct):
    """A `tokenizer.json`. Decode it with msgspec."""

    added_tokens: list[AddedToken] = []
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    model: Model = msgspec.field(default_factory=Model)


class Cuts:
    """The places of one tokenizer: before `marks`, of at least two characters each, and before a space that
    follows one of the characters `before` (`ASCII`, `ANY`; "" = none).

    Pieces have at least `least_chars` - 1 characters; at least 2.
    """

    def __init__(self, marks: Sequence[str] = (), least_chars: int = CHUNK_CHARS, before: str = "") -> None:
        self._mark = re.compile(any_of(marks)) if marks else None
        self._space = re.compile(f" (?<={before} )") if before else None
        self._longest = max(map(len, marks), default=0)
        self._least_chars = least_chars
        self.marks = tuple(marks)
        self.before = before

    def next(self, text: str, start: int) -> int:
        """The end of the piece that begins at `start`: a place far enough on, or the text's end.

        It depends on nothing before `start`, and but on a few characters after the place: texts that begin
        alike are cut alike.
        """
        size, at = len(text), start + self._least_chars - 1
        if self._mark is None and self._space is None:
            return size
        width = min(_NEAR_CHARS, _WINDOW_CHARS)
        while at + 1 < size:
            until = min(at + width, size)
            found = self._within(text, at, until)
            if found < until:
                return found
            at, width = until, min(2 * width, _WINDOW_CHARS)
        return size

    def _within(self, text: str, at: int, until: int) -> int:
        """The first place from `at` on, `until` if none is before that. Spaces are found the faster."""
        if self._space is not None and (space := self._space.search(text, at, until)):
            until = space.start()
        if self._mark is not None and (mark := self._mark.search(text, at, until + self._longest - 1)):
            return min(mark.start(), until)
        return until


def cuts_of(tokenizer_json: bytes, least_chars: int = CHUNK_CHARS) -> Cuts:
    """The places of the tokenizer that `tokenizer.json` describes; none when it is not of the known form."""
    try:
        layout = msgspec.json.decode(tokenizer_json, type=Layout)
    except (msgspec.MsgspecError, RecursionError):
        return Cuts()
    if layout.model.dropout:
        return Cuts()
    openers = _openers(layout.added_tokens)
    marks = sorted(t.content for t in layout.added_tokens if t.content[:1] in openers and len(t.content) > 1)
    return Cuts(marks, least_chars, _before_space(layout))


def _openers(tokens: Sequence[AddedToken]) -> frozenset[str]:
    """First characters that announce an added token wherever they are part of one."""
    first = {token.content[0] for token in tokens if token.content}
    inside = {character for token in tokens for character in token.content[1:]}
    unfit = {t.content[0] for t in tokens if t.content and (t.normalized or t.lstrip or t.single_word)}
    return frozenset(c for c in first - inside - unfit if not (c.isalnum() or c.isspace() or c == "_"))


def any_of(words: Iterable[str]) -> str:
    """A pattern that finds where one of `words` begins, in a time that does not grow with their number."""
    tails: dict[str, list[str]] = {}
    for word in words:
        if not word:
            return ""
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(head) + any_of(rest) for head, rest in tails.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})" if branches else ""


def _before_space(layout: Layout) -> str:
    """The class of characters after which a space is a safe place, "" when it is not."""
    if any(_reaches_over(token) for token in layout.added_tokens):
        return ""
    replaced = _replaced_space(layout.normalizer)
    found = None if replaced is None else _pre_tokenized(layout.pre_tokenizer, replaced)
    if found is None:
        return ""
    space, separates = found
    if separates:
        return ANY
    model = layout.model
    if model.type != "BPE" or model.continuing_subword_prefix or model.end_of_word_suffix:
        return ""
    return _by_vocabulary(msgspec.json.decode(model.vocab, type=dict[str, int]), space)


def _reaches_over(token: AddedToken) -> bool:
    """Whether an added token can take a space together with what is before it."""
    return token.rstrip or bool(_ENDS_IN_SPACE.search(unicodedata.normalize("NFKC", token.content)))


def _replaced_space(normalizer: Mapping[str, Any] | None) -> str | None:
    """What normalisation makes of a space; None when it may look further than at single characters."""
    if normalizer is None:
        return " "
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    space = " "
    for step in steps:
        if step.get("type") == "Replace" and step.get("pattern") == {"String": " "} and space == " ":
            space = str(step.get("content"))
        elif step.get("type") not in _NORMALIZERS:
            return None
    return space if len(space) == 1 else None


def _pre_tokenized(pre_tokenizer: Mapping[str, Any] | None, space: str) -> tuple[str, bool] | None:
    """How the model sees a space, and whether words are given to it apart; None when neither is known."""
    if pre_tokenizer is None:
        return space, False
    several = pre_tokenizer.get("type") == "Sequence"
    steps = pre_tokenizer.get("pretokenizers", []) if several else [pre_tokenizer]
    final = False
    separates = False
    for step in steps:
        kind = step.get("type")
        if final:
            return None
        if kind == "Metaspace":
            replacement = str(step.get("replacement"))
            if space not in (" ", replacement):
                return None
            space, separates, final = replacement, step.get("split", True) is True, True
        elif kind == "ByteLevel" and space == " ":
            space, final = _BYTE_SPACE, True
        elif not (kind in _UNTOUCHED or (kind == "Split" and _splits_safely(step, space))):
            return None
    return space, separates


def _splits_safely(step: Mapping[str, Any], space: str) -> bool:
    pattern = step.get("pattern", {})
    if "String" in pattern:  # a space that is none any more is never found
        return bool(pattern["String"] == " " != space)
    keeps = step.get("behavior") == "Isolated" and not step.get("invert")
    drops_gaps = step.get("behavior") == "Removed" and step.get("invert") is True
    return space == " " and (keeps or drops_gaps) and keeps_apart(str(pattern.get("Regex", "(")))


def _by_vocabulary(vocabulary: Iterable[str], space: str) -> str:
    entries = set(vocabulary)
    if space not in entries:
        return ""
    mark = re.escape(space)
    joined = "\n".join(entry for entry in entries if space in entry[1:])
    if re.search(f"{ASCII}{mark}", joined):
        return ""
    if space not in (" ", _BYTE_SPACE, _WORD_SPACE):
        return ASCII
    others = f"[^\\n{_BYTE_BLANKS}]{mark}" if space == _BYTE_SPACE else f"[^\\s{mark}]{mark}"
    return ASCII if re.search(others, joined) else ANY
