"""The time that a verb has in all, over the steps it is made of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dynctl.errors import NotReady

LEAST_S = 1.0
"""What a last step is given in any case: to say by itself that it is late."""


@dataclass(frozen=True, slots=True)
class Limit:
    """`seconds` from `began` (monotonic) on; None: as long as it takes."""

    seconds: float | None = None
    began: float = 0.0

    @staticmethod
    def of(seconds: float | None) -> Limit:
        """From now on."""
        return Limit(seconds, time.monotonic())

    def left_s(self) -> float | None:
        """What is left of it, at least `LEAST_S`."""
        if self.seconds is None:
            return None
        return max(LEAST_S, self.began + self.seconds - time.monotonic())

    def options(self) -> list[str]:
        """What is left, for the verb that another machine goes on with."""
        left_s = self.left_s()
        return [] if left_s is None else ["--timeout", f"{left_s:.3f}s"]

    @asynccontextmanager
    async def during(self, name: str, step: str) -> AsyncIterator[None]:
        """End the block when the time is over. Raises NotReady, which tells the step that was under way."""
        left_s = None if self.seconds is None else self.began + self.seconds - time.monotonic()
        scope = asyncio.timeout(left_s)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise NotReady(f"'{name}' was not up within {self.seconds:g} s: {step}") from error
