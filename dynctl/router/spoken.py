"""How many tokens a lost leg has said: what the rest's `max_tokens` and the usage of all depend on. Pure.

Known exactly where the client was told token ids, or usage with each event. Else events tell where tokens
end: an engine sends one for each token, or for several when it is ahead of its own server. What is told of an
event is the larger of how many there were (a character may take several tokens, of which but the last shows)
and how many tokens its text is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dynctl.router.said import Said

Count = Callable[[str, int, int], int | None]
"""How many tokens the part of a text from one place to another is, both being ends of tokens as far as is
known; None = not known here."""


@dataclass(frozen=True, slots=True)
class Made:
    """What was generated, as far as it was told, marks of reasoning and all: `opening` characters of a mark,
    `thoughts` of reasoning, `closing` of a mark. `kept`: how many the next leg does not say again.
    """

    text: str
    kept: int
    opening: int = 0
    thoughts: int = 0
    closing: int = 0

    @classmethod
    def plain(cls, said: Said, *, trims: bool) -> Made:
        """An answer without reasoning. `trims`: white space at its end is to be said again."""
        text = said.text
        return cls(text, len(text.rstrip()) if trims and not said.finish else len(text))

    def end(self, chars: int) -> int:
        """Where so many characters told end in `text`."""
        return chars + self.opening + (self.closing if chars > self.thoughts else 0)


@dataclass(frozen=True, slots=True)
class _Group:
    """Events up to one with new text: where they end in what was made, how many, tokens told (0 = not)."""

    end: int
    events: int
    told: int


def spoken_tokens(said: Said, made: Made, window: int, count: Count) -> int:
    """How many tokens of all legs were told whole, without those that the next leg says again.

    `window`: how many of the last characters generated the engine held back, for the request's stop strings.
    """
    if said.tokens:
        return len(said.tokens)
    at, total = said.settled
    several = False
    for group in _groups(said, made, window):
        pieces = count(made.text, at, min(group.end, len(made.text))) or 1
        if group.end > made.kept:
            if at < made.kept:
                # Of the last of these tokens a part is left out, or all.
                most = max(group.events, pieces) if several or not window else group.events
                total += min(most - 1, count(made.text, at, made.kept) or 0)
            break
        several |= pieces > group.events
        total = group.told or total + max(group.events, pieces)
        at = group.end
    return total


def _groups(said: Said, made: Made, window: int) -> list[_Group]:
    """The present leg's events by where new text ends; those at the end that showed none are left out."""
    groups: list[_Group] = []
    last, events = made.end(said.shown) if said.shown else 0, 0
    for chars, told in said.beats:
        events += 1
        end = made.end(chars) if chars else 0
        if end > last:
            groups.append(_Group(end + window, events, told))
            last, events = end, 0
    return groups
