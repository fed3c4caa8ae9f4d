"""Guards the hand-off from prefill to decode: used twice, late, or for another prompt it gives wrong text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynctl.engines.base import Handoff


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a hand-off may not be used. The caller runs prefill again, or lets decode compute the prompt."""

    reason: Literal["used", "expired", "other prompt"]


class HandoffGuard:
    """Gives one hand-off out once, for the prompt it was made of, and while prefill still holds its blocks.

    `prompt` identifies what was prefilled, for instance the client's body: any other value is another prompt.
    `margin_s` is the time the decode request may take to reach its engine.
    """

    def __init__(self, handoff: Handoff, prompt: bytes, *, margin_s: float = 1.0) -> None:
        self._handoff = handoff
        self._prompt = prompt
        self._margin_s = margin_s
        self._used = False

    def take(self, prompt: bytes, now_s: float) -> Handoff | Refused:
        """The hand-off, from now on used up; or why not. `now_s` on the clock of `Handoff.expires_at_s`.

        A refusal for another prompt leaves it to be taken for its own.
        """
        if self._used:
            return Refused("used")
        if prompt != self._prompt:
            return Refused("other prompt")
        if now_s >= self._handoff.expires_at_s - self._margin_s:
            return Refused("expired")
        self._used = True
        return self._handoff
