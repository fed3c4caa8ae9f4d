"""What a report is made of. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dynctl.perfmodel.choice import Choice, Option
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.traffic import Traffic, traffic
from dynctl.profiler.outcome import Confirmed, LayoutRun, Measurement


@dataclass(frozen=True, slots=True)
class Told:
    """One profiling. `recipe`: the file that was asked about; `next_command`: what to run now, "" = nothing.

    `profiles`: the curves that `choice` rests on; `measured`: None when nothing was measured.
    """

    name: str
    recipe: str
    choice: Choice
    profiles: Mapping[Layout, Profile] = field(default_factory=dict)
    gpus: int = 0
    next_command: str = ""
    measured: Measurement | None = None

    @property
    def mix(self) -> Traffic:
        """The demand as pools see it."""
        return traffic(self.choice.demand)

    @property
    def confirmed(self) -> Confirmed | None:
        """The last measurement of the chosen split as a whole; None when there is none."""
        rounds = self.measured.rounds if self.measured else ()
        mine = [one for one in rounds if same(one.option, self.choice.chosen)]
        return mine[-1] if mine else None

    @property
    def runs(self) -> tuple[LayoutRun, ...]:
        """The candidates that were measured."""
        return self.measured.layouts if self.measured else ()

    def shown(self) -> list[Option]:
        """The options, the chosen one first, each split once."""
        first = [self.choice.chosen] if self.choice.chosen else []
        found: list[Option] = []
        for option in (*first, *self.choice.options):
            if not any(same(option, one) for one in found):
                found.append(option)
        return found


def same(one: Option, other: Option | None) -> bool:
    """Whether both are the same pools."""
    return other is not None and (one.label, one.mode) == (other.label, other.mode)
