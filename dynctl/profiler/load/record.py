"""What became of one request. Values only."""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Record:
    """Times in seconds from the start of the load. `due_s` is when it was to be sent, `sent_s` when it was.

    `times`: when the pieces of its answer came that were not empty. `output_tokens` as the server counted
    them (`counted`), else the pieces. `cached_tokens` None: the server does not tell. `error` "" = completed.
    """

    number: int
    turn: int = 0
    due_s: float
    sent_s: float
    end_s: float = 0.0
    times: array[float] = field(default_factory=lambda: array("d"))
    asked_input: int
    asked_output: int
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    counted: bool = False
    finish: str = ""
    status: int = 0
    error: str = ""
    interrupted: bool = False

    @property
    def completed(self) -> bool:
        """Whether the whole answer came."""
        return not self.error and not self.interrupted

    @property
    def late_s(self) -> float:
        """How long after its time it was sent."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """First piece that was not empty, after the send."""
        return self.times[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Last piece, after the send."""
        return self.times[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (tokens - 1); None for an answer of one token."""
        if self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next, 0 for those that came together."""
        return [after - before for before, after in itertools.pairwise(self.times)]
