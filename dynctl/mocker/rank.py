"""One data-parallel rank at work: the loop that runs a scheduler's steps against the clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final, Protocol

from dynctl.mocker.events import encode_batch
from dynctl.mocker.faults import Faults
from dynctl.mocker.metrics import Latencies
from dynctl.mocker.scheduler import Output, Scheduler, Sequence, Step
from dynctl.perfmodel.profile import Profile

logger = logging.getLogger(__name__)

_LAG_S: Final = 0.05
"""Simulated time may run so far behind the clock before the loop stops making up for it."""
_IDLE_S: Final = 1.0
"""How long an idle loop sleeps at most when no lease ends earlier."""


class Owner(Protocol):
    """Who a sequence answers to: its `owner`."""

    def on_token(self, seq: Sequence, token: int, reason: str) -> bool:
        """A token; `reason` is set with the last one. True: stop the sequence here."""
        ...


class Rank:
    """Runs one scheduler. `publish` takes payloads of KV events, `fetch` sequences to pull KV for."""

    def __init__(
        self,
        number: int,
        scheduler: Scheduler,
        profile: Profile,
        speedup: float,
        faults: Faults,
    ) -> None:
        self.number = number
        self.scheduler = scheduler
        self.latencies = Latencies()
        self.publish: Callable[[bytes], object] | None = None
        self.fetch: Callable[[Rank, Sequence], None] | None = None
        self.crash: Callable[[], None] | None = None
        self._profile = profile
        self._speedup = speedup
        self._faults = faults
        self._wake = asyncio.Event()
        self._step_ends_s = 0.0

    def submit(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(seq, time.monotonic())
        self._wake.set()

    def stop(self, seq: Sequence, reason: str) -> None:
        """End a sequence early ("abort", "error", "stop"); its owner is not told."""
        self.scheduler.finish(seq, reason, time.monotonic())
        self._wake.set()

    def received(self, seq: Sequence) -> None:
        """A sequence's prompt KV is there."""
        self.scheduler.received(seq)
        self._wake.set()

    def unpin(self, request_id: str) -> None:
        """A decode engine has read, or gives up, the blocks kept for it."""
        self.scheduler.unpin(request_id)
        self._wake.set()

    def wake(self) -> None:
        """Look again whether there is work: something changed from outside."""
        self._wake.set()

    async def run(self) -> None:
        """Step for ever."""
        scheduler = self.scheduler
        while True:
            self._wake.clear()
            step = None if self._faults.hang else scheduler.begin(time.monotonic())
            for seq in scheduler.take_transfers():
                if self.fetch is not None:
                    self.fetch(self, seq)
            if step is None:
                await self._idle()
                continue
            await self._spend(self._seconds(step))
            outputs = scheduler.commit(step, time.monotonic())
            self._publish_events()
            if outputs:
                self._deliver(outputs)

    async def _idle(self) -> None:
        """Sleep until woken, or until the next lease ends."""
        deadline = self.scheduler.pins.next_deadline_s()
        limit = _IDLE_S if deadline is None else max(0.001, min(_IDLE_S, deadline - time.monotonic()))
        timer = asyncio.get_running_loop().call_later(limit, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        self._step_ends_s = time.monotonic()  # idle time is not time in hand for the steps to come

    async def _spend(self, seconds: float) -> None:
        """Let a step's time pass, counted from where the last step ended, so that errors do not add up."""
        now = time.monotonic()
        self._step_ends_s = max(self._step_ends_s, now - _LAG_S) + seconds if seconds else now
        left = self._step_ends_s - now
        await asyncio.sleep(left if left > 0.0005 else 0)

    def _seconds(self, step: Step) -> float:
        """How long a step takes."""
        if not self._speedup:
            return 0.0
        profile = self._profile
        work = sum(profile.prefill_s(start, count) for start, count in step.prefills)
        context = step.context / step.batch if step.batch else 0.0
        return profile.step_s(work, step.batch, context) / self._speedup

    def _publish_events(self) -> None:
        events = self.scheduler.pool.take_events()
        if events and self.publish is not None:
            size = self.scheduler.pool.block_size
            self.publish(encode_batch(time.time(), events, self.number, size))

    def _deliver(self, outputs: list[Output]) -> None:
        """Hand the tokens of one step to their owners."""
        now = time.monotonic()
        itl = self.latencies.itl
        for seq, token, reason in outputs:
            owner: Owner = seq.owner
            if seq.generated == 1:
                self._first_token(seq, now)
            else:
                itl.observe(now - seq.last_token_s)
            seq.last_token_s = now
            if owner.on_token(seq, token, reason) and not reason:
                self.scheduler.finish(seq, "stop", now)
            if seq.finish:
                self.latencies.e2e.observe(now - seq.arrived_s)
                self.latencies.decode.observe(now - seq.first_token_s)
        if self._faults.crashes(len(outputs)) and self.crash is not None:
            self.crash()

    def _first_token(self, seq: Sequence, now: float) -> None:
        seq.first_token_s = now
        self.latencies.ttft.observe(now - seq.arrived_s)
        self.latencies.queue.observe(seq.started_s - seq.arrived_s)
        self.latencies.prefill.observe(now - seq.started_s)
