"""One probe on a running engine: a small load, and whether what came of it may be used.

What is not valid is measured once more, with other prompts, then refused with its reason: it is never
averaged in. Decode is isolated by sending the same prompts twice, first for a few tokens, so that the
second pass finds them in the cache; and a step is timed only while all answers of the batch are written.
"""

from __future__ import annotations

import asyncio
import random
from statistics import fmean, median

from dynctl.errors import DynctlError, ProfileError, RequestError, TransportError
from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.profile import Profile
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.run import Measured, Watch, run
from dynctl.profiler.load.spec import Closed, Endpoint, Lengths, Load
from dynctl.profiler.outcome import DecodePoint, PrefillPoint
from dynctl.profiler.search import DecodeProbe, PrefillProbe, Probe

REQUESTS = 5
_WARM = 1
STEPS = 32
_MOST_STEPS = 256
_LEAST_STEPS = 8
_STRETCH = 4
_HIT = 0.7
"""So much of the prompts must be in the cache at the second pass, where the engine tells."""
_FILLERS = 8
_FIRST = 4
"""Tokens of answers of which only the beginning matters: one alone may be a piece without text."""
_LONGER = 10.0
_LEAST_S, _MOST_S = 15.0, 120.0
"""A request of a probe may take `_LONGER` times what is expected, within these bounds: who takes more hangs.
"""
_PAUSE_S = 1.0
"""Before it is measured again: what spoilt it may be over by then."""
_ANY_S = 3600.0
"""Nothing is asked of the time to first token when steps are timed, nor of steps when that is: how late the
client may be goes by the time that is measured.
"""

Point = PrefillPoint | DecodePoint


class Refused(Exception):
    """A measurement that must not be used, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unserved(Exception):
    """Both times a request failed, or did not end in time; why, of the last one."""


def deadline_s(probe: Probe, estimate: Profile, spread: float) -> float:
    """How long a request of the probe may take, by the estimate, which may be `spread` times off."""
    if isinstance(probe, PrefillProbe):
        expected_s = estimate.step_s(estimate.prefill_s(0, probe.isl), 0, 0)
    else:
        reading_s = estimate.prefill_s(0, probe.context) * probe.batch
        expected_s = reading_s + _MOST_STEPS * estimate.decode_s(probe.batch, probe.context)
    return min(_MOST_S, max(_LEAST_S, _LONGER * spread * expected_s))


async def measured(
    probe: Probe, endpoint: Endpoint, seed: str, deadline_s: float
) -> tuple[Point | None, str]:
    """The point, or None and why there is none. Prompts depend on `seed`: never twice the same one at one
    engine. `deadline_s`: of each request; the first that fails or takes longer ends the attempt.

    Raises Unserved when both attempts ended that way.
    """
    reasons: list[str] = []
    steps, unserved = STEPS, 0
    for attempt in range(2):
        if attempt:
            await asyncio.sleep(_PAUSE_S)
        number = random.Random(f"{seed}/{attempt}").randrange(1 << 31)
        try:
            if isinstance(probe, PrefillProbe):
                return await _prefill(probe, endpoint, number, deadline_s), ""
            return await _decode(probe, endpoint, number, (steps, deadline_s)), ""
        except Refused as refused:
            reasons.append(refused.reason)
            steps = min(_MOST_STEPS, steps * 2)
        except (RequestError, TransportError) as error:
            unserved += 1
            reasons.append(str(error))
        except ProfileError as error:
            reasons.append(str(error))
    if unserved == len(reasons):
        raise Unserved(reasons[-1])
    return None, "; then ".join(dict.fromkeys(reasons))


async def _prefill(probe: PrefillProbe, endpoint: Endpoint, seed: int, deadline_s: float) -> PrefillPoint:
    load = Load(
        arrivals=Closed(concurrency=1),
        isl=Lengths(tokens=probe.isl),
        osl=Lengths(tokens=_FIRST),
        requests=REQUESTS,
        warmup=_WARM,
        api="completions",
        seed=seed,
        deadline_s=deadline_s,
        until_failure=True,
        sla=Sla(itl_s=_ANY_S),
    )
    return prefill_point(await run(load, endpoint, Watch()))


def prefill_point(got: Measured) -> PrefillPoint:
    """The point. Raises Refused."""
    if got.result.problems:
        raise Refused("; ".join(got.result.problems))
    done = [record for record in got.records if record.completed and record.number >= _WARM]
    times = [record.ttft_s for record in done]
    return PrefillPoint(
        isl=fmean(record.input_tokens for record in done),
        seconds=median(times),
        low_s=min(times),
        high_s=max(times),
        requests=len(done),
    )


async def _decode(probe: DecodeProbe, endpoint: Endpoint, seed: int, size: tuple[int, float]) -> DecodePoint:
    steps, deadline_s = size
    first = Load(
        arrivals=Closed(concurrency=min(probe.batch, _FILLERS)),
        isl=Lengths(tokens=max(1, probe.context - steps // 2)),
        osl=Lengths(tokens=_FIRST),
        requests=probe.batch,
        api="completions",
        seed=seed,
        deadline_s=deadline_s,
        until_failure=True,
        sla=Sla(ttft_s=_ANY_S),
    )
    filled = await run(first, endpoint, Watch())
    if filled.result.counts.completed < probe.batch:
        raise Refused("; ".join(filled.result.problems) or "not all prompts were read")
    again = Load(
        arrivals=Closed(concurrency=probe.batch),
        isl=first.isl,
        osl=Lengths(tokens=steps + 1),
        requests=probe.batch,
        api="completions",
        seed=seed,
        deadline_s=deadline_s,
        until_failure=True,
        repeated=True,
        sla=Sla(ttft_s=_ANY_S),
    )
    return decode_point(await run(again, endpoint, Watch()), probe.batch)


def decode_point(got: Measured, batch: int) -> DecodePoint:
    """The point of a second pass. Raises Refused."""
    result = got.result
    if result.problems:
        raise Refused("; ".join(result.problems))
    if result.cached is not None and result.cached < _HIT:
        raise Refused(f"only {result.cached:.0%} of the prompts were in the cache at the second pass")
    done = [record for record in got.records if record.completed]
    begin_s, end_s = max(r.times[0] for r in done), min(r.times[-1] for r in done)
    spans = [span for record in done if (span := _span(record, begin_s, end_s)) is not None]
    if len(spans) < batch:
        raise Refused(f"the {batch} answers were not written at the same time")
    return DecodePoint(
        batch=batch,
        context=fmean(r.input_tokens + r.output_tokens / 2 for r in done),
        seconds=fmean(seconds for seconds, _ in spans),
        steps=round(fmean(steps for _, steps in spans)),
        cached=result.cached,
    )


def _span(record: Record, begin_s: float, end_s: float) -> tuple[float, float] | None:
    """(Seconds of a step, steps) of an answer between the first and the last piece in that time; None for too
    few. Of stretches of some steps the median: what else the machine does for a moment is in few of them.
    """
    inside = [at_s for at_s in record.times if begin_s <= at_s <= end_s]
    per_piece = record.output_tokens / len(record.times)
    steps = (len(inside) - 1) * per_piece
    if steps < _LEAST_STEPS or inside[-1] <= inside[0]:
        return None
    stretches = [after - before for before, after in zip(inside, inside[_STRETCH:], strict=False)]
    return median(stretches) / (_STRETCH * per_piece), steps


def lines_of(error: DynctlError) -> tuple[str, tuple[str, ...]]:
    """A failure as one line, and the engine's last lines that it came with."""
    first, *rest = str(error.message).splitlines() or [""]
    return first, tuple(line.strip() for line in rest if line.strip() and not line.startswith("more:"))
