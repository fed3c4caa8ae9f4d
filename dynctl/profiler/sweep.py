"""Measures layouts, several at once on GPUs of their own: start, probe, end; each step in the journal.

An engine is started only when the journal lacks an answer, once for the probes of both roles. One that does
not start or dies costs what that took: it is recorded with its last lines, and the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import msgspec

from dynctl.errors import DynctlError, NotReady, ProcessExited, ProfileError
from dynctl.perfmodel.choice import Option
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.traffic import Traffic, traffic
from dynctl.profiler import search
from dynctl.profiler.candidate import alone, candidate, depends_on
from dynctl.profiler.journal import key_of
from dynctl.profiler.outcome import DecodePoint, LayoutRun, PrefillPoint, Refusal
from dynctl.profiler.probe import Point, Unserved, deadline_s, lines_of, measured
from dynctl.profiler.search import DecodeProbe, PrefillProbe, Probe
from dynctl.profiler.service import ask_of
from dynctl.profiler.stage import Spoilt, Stage, kv_tokens
from dynctl.profiler.starts import Standing

logger = logging.getLogger(__name__)

_LEAST_S = 10.0
"""With less of the budget left no probe is begun."""
_STEPS = 3 + search.MOST_DECODES
OUT_OF_TIME = "the budget was used up"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a candidate's engine is not there, and its last lines."""

    failure: str
    lines: tuple[str, ...] = ()


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """KV that a started engine has, in tokens; 0 = it does not say."""

    kv_tokens: int


class _Over(Exception):
    """No more of this layout, for this reason."""


class _Unserving(_Over, Spoilt):
    """It runs, but answers nothing."""


@dataclass(slots=True)
class _One:
    """A layout while it is measured."""

    layout: Layout
    estimate: Profile
    basis: str
    prefill: list[PrefillPoint] = field(default_factory=list)
    decode: list[DecodePoint] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    standing: Standing | None = None
    start_s: float = 0.0

    @property
    def label(self) -> str:
        return self.layout.label


class Sweep:
    """The measuring of several layouts with what `stage` has. `fits` are the profiles found so far."""

    def __init__(self, stage: Stage, estimates: Mapping[Layout, Profile]) -> None:
        self._stage, self._estimates = stage, estimates
        self._mix: Traffic = traffic(stage.asked.demand)
        self.fits: dict[Layout, Profile] = {}

    async def run(self, layouts: Sequence[Layout]) -> list[LayoutRun]:
        """Each measured, or why not. Raises ProfileError when the journal cannot be written; all is ended."""
        tasks = [asyncio.create_task(self._layout(layout)) for layout in layouts]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [task.result() for task in sorted(tasks, key=lambda task: task.cancelled())]

    async def _layout(self, layout: Layout) -> LayoutRun:
        one = _One(layout, self._estimates[layout], self._basis(layout))
        begun_s, failure, stopped = time.monotonic(), Failure(failure=""), ""
        self._stage.shown.begin(one.label, _STEPS)
        try:
            async with AsyncExitStack() as stack:
                await self._points(one, stack)
        except _Over as over:
            stopped = str(over)
        except ProfileError:
            raise
        except DynctlError as error:
            if isinstance(error, NotReady) and self._stage.left_s <= 0.0:
                stopped = f"{OUT_OF_TIME} before it was ready"
            else:
                failure = await self._failed(one, error)
        except Exception as error:
            # The top of a layout's task: what breaks here must not end the measuring of the others.
            logger.exception("layout.broke layout=%s", one.label)
            self.fits.pop(layout, None)
            failure = Failure(failure=f"{type(error).__name__}: {error}")
        profile = self.fits.get(layout)
        told = failure.failure or stopped or f"{len(one.prefill)} + {len(one.decode)} points"
        self._stage.shown.end(one.label, told)
        return LayoutRun(
            layout=layout,
            estimated=one.estimate,
            fitted=None if failure.failure else profile,
            prefill=tuple(one.prefill),
            decode=tuple(one.decode),
            refused=tuple(one.refused),
            failure=failure.failure,
            lines=failure.lines,
            stopped=stopped,
            start_s=one.start_s,
            took_s=time.monotonic() - begun_s,
        )

    def _basis(self, layout: Layout) -> str:
        stage = self._stage
        made = candidate(stage.asked.loaded, self._alone(layout), "candidate", "")
        return key_of(depends_on(made, layout, stage.version, stage.hardware))

    def _alone(self, layout: Layout) -> Option:
        return alone(layout, self._estimates[layout].limits)

    async def _failed(self, one: _One, error: DynctlError) -> Failure:
        self.fits.pop(one.layout, None)
        first, lines = lines_of(error)
        failure = Failure(failure=first, lines=lines)
        if isinstance(error, ProcessExited):  # all else may be otherwise the next time
            self._stage.journal.answer(key_of(one.basis, "start"), f"{one.label} start", failure)
        return failure

    async def _points(self, one: _One, stack: AsyncExitStack) -> None:
        """All points of a layout, as far as they are worth their time. Raises _Over, DynctlError."""
        asked = self._stage.asked
        known = self._stage.journal.found(key_of(one.basis, "start"))
        if known is not None:
            raise _Known(msgspec.convert(known, Failure))
        for probe in search.prefill_probes(asked.demand, asked.longest):
            await self._probe(one, probe, stack)
        self._require(one, one.prefill, "prompt")
        await self._with_room(one)
        for batch in search.decode_probes(self._fit(one), self._mix, asked.sla.itl_s):
            await self._probe(one, batch, stack)
        self._fit(one)
        self._require(one, one.decode, "step")
        if not search.worth(ask_of(asked, {}), self.fits, one.layout):
            raise _Over("15 % better than measured would not be enough")
        while True:
            following = search.next_decode(self._fit(one), one.decode, self._mix, asked.sla.itl_s)
            if following is None or any(r.what == following.label for r in one.refused):
                return
            await self._probe(one, following, stack)

    def _require(self, one: _One, points: Sequence[Point], what: str) -> None:
        """Raises _Over when none is left of them, with why: there is no profile of such a layout."""
        if not points:
            why = "; ".join(dict.fromkeys(refusal.reason for refusal in one.refused))
            raise _Over(f"no {what} was measured that can be relied on: {why}")

    def _fit(self, one: _One) -> Profile:
        fit = search.fitted(one.estimate, one.prefill, one.decode, self._stage.spread)
        if one.prefill and one.decode:
            self.fits[one.layout] = fit
        return fit

    async def _probe(self, one: _One, probe: Probe, stack: AsyncExitStack) -> None:
        """The answer of the journal, else of the engine, which is started if it is not there."""
        stage, key = self._stage, key_of(one.basis, probe)
        stage.shown.step(one.label, probe.label)
        told = f"{probe.label} measured"
        known = stage.journal.found(key)
        if known is not None:
            stage.reused += 1
            told = f"{probe.label} known"
            self._keep(one, _again(probe, known))
        else:
            point, reason = await self._ask(one, probe, stack)
            stage.journal.answer(key, f"{one.label} {probe.label}", point, refused=reason)
            stage.probes += 1
            if point is not None:
                self._keep(one, point)
            else:
                one.refused.append(Refusal(what=probe.label, reason=reason))
                told = f"{probe.label} refused: {reason}"
        stage.shown.step(one.label, told, done=True)

    def _keep(self, one: _One, point: Point) -> None:
        if isinstance(point, PrefillPoint):
            one.prefill.append(point)
        else:
            one.decode.append(point)

    async def _ask(self, one: _One, probe: Probe, stack: AsyncExitStack) -> tuple[Point | None, str]:
        """Ask the engine; DynctlError when it dies meanwhile."""
        stage = self._stage
        if stage.left_s < _LEAST_S:
            raise _Over(OUT_OF_TIME)
        if one.standing is None:
            stage.shown.step(one.label, "starting")
            one.standing = await stack.enter_async_context(self._started(one))
            stage.shown.step(one.label, probe.label)
        if isinstance(probe, DecodeProbe) and probe.batch > search.largest(one.estimate, probe.context):
            probe = DecodeProbe(batch=search.largest(one.estimate, probe.context), context=probe.context)
        seed = f"{stage.run}/{one.basis}/{probe.label}"
        limit_s = deadline_s(probe, one.estimate, stage.spread)
        asking = asyncio.create_task(measured(probe, stage.endpoint(one.standing), seed, limit_s))
        dying = asyncio.create_task(stage.starts.died(one.standing))
        limit = asyncio.create_task(asyncio.sleep(max(_LEAST_S, stage.left_s)))
        try:
            await asyncio.wait((asking, dying, limit), return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                raise dying.result()
            if asking.done():
                try:
                    point, reason = asking.result()
                except Unserved as unserved:
                    point, reason = None, str(unserved)
                if point is None:
                    await self._look_again(dying)
                    if asking.exception() is not None and not (one.prefill or one.decode):
                        raise _Unserving(f"it serves nothing: {reason}")
                return point, reason
            raise _Over(OUT_OF_TIME)
        finally:
            for task in (asking, dying, limit):
                task.cancel()
            await asyncio.gather(asking, dying, limit, return_exceptions=True)

    async def _look_again(self, dying: asyncio.Task[DynctlError]) -> None:
        """A probe that failed may be the first sign of a death: wait a moment for it to be told."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(3.0):
                raise await asyncio.shield(dying)

    @asynccontextmanager
    async def _started(self, one: _One) -> AsyncIterator[Standing]:
        stage = self._stage
        word = "".join(c if c.isalnum() else "-" for c in one.label.lower())
        async with stage.slots.take(one.layout.gpus) as hosts:
            begun_s = time.monotonic()
            async with stage.standing(self._alone(one.layout), word, hosts) as standing:
                one.start_s = time.monotonic() - begun_s
                yield standing

    async def _with_room(self, one: _One) -> None:
        """The limits of the estimate with the KV that the engine really has, which it says after a while."""
        key = key_of(one.basis, "room")
        known = self._stage.journal.found(key)
        room = msgspec.convert(known, Room).kv_tokens if known is not None else 0
        if known is None and one.standing is not None:
            room = one.layout.data * await kv_tokens(self._stage.endpoint(one.standing))
            if room:
                self._stage.journal.answer(key, f"{one.label} room", Room(kv_tokens=room))
        if room and one.estimate.limits is not None:
            limits = msgspec.structs.replace(one.estimate.limits, kv_tokens=room)
            one.estimate = msgspec.structs.replace(one.estimate, limits=limits)


def _again(probe: Probe, known: object) -> Point:
    """What the journal has of a probe."""
    if isinstance(probe, PrefillProbe):
        return msgspec.structs.replace(msgspec.convert(known, PrefillPoint), reused=True)
    return msgspec.structs.replace(msgspec.convert(known, DecodePoint), reused=True)


class _Known(DynctlError):
    """A failure that the journal tells of."""

    def __init__(self, known: Failure) -> None:
        super().__init__("\n".join([known.failure, *known.lines]))
