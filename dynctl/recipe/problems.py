"""What is wrong in a file, as one error that tells everything at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dynctl.errors import RecipeError

MOST_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: `where` is file:line or the flag that brought it in, `hint` what would be valid."""

    where: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text} ({self.hint})" if self.hint else text


def as_error(problems: Sequence[Problem], file: str) -> RecipeError:
    """One error for all of `problems` (at least one), each once; of very many the first are told."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) == 1:
        only = distinct[0]
        return RecipeError(only.message, where=only.where or file, hint=only.hint)
    lines = [f"  {problem}" for problem in distinct[:MOST_SHOWN]]
    if len(distinct) > MOST_SHOWN:
        lines.append(f"  and {len(distinct) - MOST_SHOWN} more")
    return RecipeError("\n".join([f"{len(distinct)} problems", *lines]), where=file)


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt word: the nearest valid one, and all of them."""
    names = sorted(valid)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    listed = "valid: " + ", ".join(names) if names else "none are valid here"
    return f"did you mean '{near[0]}'? {listed}" if near else listed
