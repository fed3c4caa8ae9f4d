"""One engine on the simulated clock: the mocker's scheduler, stepped as its profile tells.

While an engine only decodes, and nothing comes or ends, its steps are all alike: they are one jump. Who looks
at it in between (`catch_up`) finds it as if it had been stepped one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Protocol

from dynctl.mocker.blocks import BlockEvent, BlockPool
from dynctl.mocker.leases import PinBoard
from dynctl.mocker.scheduler import Limits, Output, Scheduler, Sequence, Step
from dynctl.simulator.clock import Clock
from dynctl.simulator.pace import Pace

_NO_LEASE_S = 1e12
"""Decode fetches every prefill here, so no lease ever ends."""


class Listener(Protocol):
    """Whoever owns engines; `engine` is the name of the one that speaks."""

    def said(self, engine: str, outputs: list[Output]) -> None:
        """A step's tokens; the first and the last ones of all sequences are told."""
        ...

    def cached(self, engine: str, events: list[BlockEvent]) -> None:
        """Its prefix cache has changed."""
        ...

    def fetch(self, engine: str, seq: Sequence) -> None:
        """`seq` has its blocks: its prompt's KV is to be fetched now."""
        ...

    def rested(self, engine: str) -> None:
        """It has nothing to compute."""
        ...


@dataclass(frozen=True, slots=True)
class Model:
    """What the engines of a role are. `jumps` False: every step is taken by itself, which gives the same."""

    blocks: int
    block_size: int
    limits: Limits
    pace: Pace
    jumps: bool = True


class Engine:
    """The scheduler of one replica."""

    def __init__(self, name: str, model: Model, clock: Clock, listener: Listener) -> None:
        self.pool = pool = BlockPool(model.blocks, model.block_size)
        self.scheduler = Scheduler(model.limits, pool, PinBoard(_NO_LEASE_S))
        self.steps = 0
        self._name = name
        self._pace = model.pace
        self._jumps = model.jumps
        self._clock = clock
        self._listener = listener
        self._step: Step | None = None
        self._since_s = 0.0
        self._context = 0
        self._planned = 0
        self._taken = 0
        self._version = 0
        self._quiet_until_s = inf

    @property
    def empty(self) -> bool:
        """Nothing is to be computed here, and nothing that was is still to be fetched."""
        return not self.scheduler.unfinished and not len(self.scheduler.pins)

    def turn(self, name: str, pace: Pace) -> None:
        """Go on under another name, at another pace, with the cache that there is; nothing is to be done."""
        assert self.empty, f"{self._name} still has requests"
        self._name, self._pace = name, pace

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self._interrupt()
        self.scheduler.add(seq, self._clock.now_s)
        self._go_on()

    def received(self, seq: Sequence) -> None:
        """The KV of its prompt is here."""
        self._interrupt()
        self.scheduler.received(seq)
        self._go_on()

    def unpin(self, name: str) -> None:
        """The KV of a prefill has been fetched, or is not needed."""
        self._interrupt()
        self.scheduler.unpin(name)
        self._go_on()

    def catch_up(self) -> None:
        """Be as it is now: complete the steps of a jump that are over."""
        step = self._step
        if step is None or self._planned - 1 == self._taken:
            return
        elapsed_s = self._clock.now_s - self._since_s
        over = self._pace.done(step.batch, self._context, self._planned - 1, elapsed_s)
        if over > self._taken:
            self.scheduler.repeat(step, over - self._taken)
            self._taken = over
            self._tell()

    def show_cache(self) -> None:
        """Have evictions told that are over by now."""
        if self._clock.now_s >= self._quiet_until_s:
            self.catch_up()
            self._foresee()

    def _interrupt(self) -> None:
        """Something changes: the jump ends with the step that is being computed."""
        self.catch_up()
        if self._step is not None and self._planned > self._taken + 1:
            self._planned = self._taken + 1
            self._schedule_end()

    def _go_on(self) -> None:
        if self._step is None:
            self._begin()

    def _begin(self) -> None:
        scheduler, now_s = self.scheduler, self._clock.now_s
        self._step = step = scheduler.begin(now_s)
        for seq in scheduler.take_transfers():
            self._listener.fetch(self._name, seq)
        self._tell()
        if step is None:
            self._listener.rested(self._name)
            return
        self._since_s, self._context, self._taken = now_s, step.context, 0
        self._planned = scheduler.alike(step) if self._jumps else 1
        self._foresee()
        self._schedule_end()

    def _foresee(self) -> None:
        """Note until when no sequence of a jump will need another block."""
        self._quiet_until_s = inf
        step = self._step
        if step is None or self._planned - 1 == self._taken:
            return
        size = self.pool.block_size
        steps = self._taken + min(len(seq.blocks) * size - seq.computed for seq, _ in step.work)
        if steps < self._planned:
            self._quiet_until_s = self._since_s + self._pace.alike_s(step.batch, self._context, steps)

    def _schedule_end(self) -> None:
        step = self._step
        assert step is not None
        if step.prefills or not step.batch:
            took_s = self._pace.step_s(step)
        else:
            took_s = self._pace.alike_s(step.batch, self._context, self._planned)
        self._version += 1
        version = self._version
        self._clock.at(self._since_s + took_s, lambda: self._end(version))

    def _end(self, version: int) -> None:
        step = self._step
        if version != self._version or step is None:
            return
        if self._planned - 1 > self._taken:
            self.scheduler.repeat(step, self._planned - 1 - self._taken)
        self.steps += self._planned
        self._taken = self._planned - 1
        outputs = self.scheduler.commit(step, self._clock.now_s)
        self._tell()
        # What the listener adds now is there before the next step is decided.
        self._listener.said(self._name, outputs)
        self._begin()

    def _tell(self) -> None:
        events = self.pool.take_events()
        if events:
            self._listener.cached(self._name, events)
