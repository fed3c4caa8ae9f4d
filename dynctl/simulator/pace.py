"""How long an engine's steps take, one by one and many alike at once. Pure."""

from __future__ import annotations

from bisect import bisect_right
from math import ceil

from dynctl.mocker.scheduler import Step
from dynctl.perfmodel.profile import Profile


class Pace:
    """The times of one profile, as the simulated engine takes them."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._contexts = profile.decode.context
        self._lines: dict[int, list[float]] = {}

    def step_s(self, step: Step) -> float:
        """Seconds of one step."""
        profile = self._profile
        work_s = sum(profile.prefill_s(start, count) for start, count in step.prefills)
        context = step.context / step.batch if step.batch else 0.0
        return profile.step_s(work_s, step.batch, context)

    def alike_s(self, batch: int, context: int, steps: int) -> float:
        """Seconds of `steps` steps of `batch` sequences, `context` tokens in all before the first of them,
        each sequence growing by one a step: the sum of `Profile.decode_s`, in closed form by line segment.
        """
        xs, ys = self._contexts, self._line(batch)
        at, total = context / batch, 0.0
        while steps > 0:
            i = min(max(bisect_right(xs, at) - 1, 0), len(xs) - 2)
            slope = (ys[i + 1] - ys[i]) / (xs[i + 1] - xs[i])
            here = steps
            if i < len(xs) - 2 and at + steps > xs[i + 1]:
                here = max(1, ceil(xs[i + 1] - at))
            first = ys[i] + slope * (at - xs[i])
            last = first + slope * (here - 1)
            if first < 0.0 or last < 0.0:
                total += sum(max(0.0, first + slope * step) for step in range(here))
            else:
                total += here * (first + last) / 2
            at += here
            steps -= here
        return total

    def done(self, batch: int, context: int, most: int, elapsed_s: float) -> int:
        """How many of `most` such steps are over after so long."""
        low, high = 0, most + 1
        low_s, high_s = 0.0, self.alike_s(batch, context, high)
        while high - low > 1:
            span_s = high_s - low_s
            guess = low + int((elapsed_s - low_s) / span_s * (high - low)) if span_s > 0.0 else low
            middle = min(max(guess, low + 1), high - 1)
            middle_s = self.alike_s(batch, context, middle)
            if middle_s <= elapsed_s:
                low, low_s = middle, middle_s
            else:
                high, high_s = middle, middle_s
        return low

    def _line(self, batch: int) -> list[float]:
        """Step times at the profile's contexts; between them they lie on straight lines."""
        line = self._lines.get(batch)
        if line is None:
            grid = self._profile.decode
            i = min(max(bisect_right(grid.batch, batch) - 1, 0), len(grid.batch) - 2)
            part = (batch - grid.batch[i]) / (grid.batch[i + 1] - grid.batch[i])
            line = [a + part * (b - a) for a, b in zip(grid.seconds[i], grid.seconds[i + 1], strict=True)]
            self._lines[batch] = line
        return line
