"""The chosen split, started whole behind the real router and measured at the rate it was chosen for.

What is measured is held against what was predicted. When the SLA is missed, the profiles are corrected by the
times that would explain what was seen, and the split is chosen again.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from dynctl.errors import DynctlError, NotReady, ProfileError
from dynctl.perfmodel.choice import Option, Sla
from dynctl.perfmodel.fit import scaled
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask, Offers
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.trace import TraceRequest
from dynctl.profiler.candidate import candidate, depends_on
from dynctl.profiler.journal import key_of
from dynctl.profiler.load.result import Result
from dynctl.profiler.load.run import Watch, run
from dynctl.profiler.load.spec import Endpoint, Lengths, Load, Open, Replay
from dynctl.profiler.load.statistics import Figure, label
from dynctl.profiler.outcome import Confirmed
from dynctl.profiler.probe import lines_of
from dynctl.profiler.stage import Stage
from dynctl.protocol.instances import Role

_ENOUGH: float = 15.0
"""So many requests late must be looked at for a percentile: 300 for p95."""
_FEWEST = 50
_WARM_SHARE = 0.1
_FILL = 2.0
"""So many stays of a request (from its arrival to its last token) go by until batches are as full as they
get."""
_STAYS = 5.0
"""So many stays are looked at: of a trial that is over before batches are full, the times tell nothing."""
_TAIL_S = 20.0
_BLOCK = 64
"""Tokens of the blocks that prompts of a mix have in common."""
_MOST_FACTOR = 3.0
_STEP = 1.03
"""A correction is at least this: else the same split would be chosen again."""

NO_TIME = "the budget does not allow enough requests"

Correction = Mapping[Role, tuple[float, float]]
"""Role → by how much longer its reading and its steps take than fitted."""
NONE: Correction = {}


class Trial(NamedTuple):
    """`requests` that are looked at, after `warmup` while which the batches fill."""

    requests: int
    warmup: int


def load_for(ask: Ask, rate: float, trial: Trial, seed: int) -> Load:
    """Poisson arrivals at `rate` with the demand's lengths and share of common beginnings."""
    demand, (requests, warmup) = ask.demand, trial
    always: dict[str, Any] = {"warmup": warmup, "api": "completions", "seed": seed, "sla": ask.sla}
    if len(set(demand.lengths)) == 1:
        isl, osl = demand.lengths[0]
        return Load(
            arrivals=Open(rate=rate),
            isl=Lengths(tokens=isl),
            osl=Lengths(tokens=osl),
            requests=requests,
            shared_tokens=round(demand.hit_rate * isl),
            **always,
        )
    rng, at_s, drawn = random.Random(seed), 0.0, []
    for _ in range(requests + warmup):
        isl, osl = rng.choice(demand.lengths)
        common = range(round(demand.hit_rate * isl / _BLOCK))
        drawn.append(TraceRequest(at_s, isl, osl, tuple(common)))
        at_s += rng.expovariate(rate)
    return Load(arrivals=Replay(requests=tuple(drawn), block_tokens=_BLOCK), **always)


def trial_for(ask: Ask, option: Option, rate: float, left_s: float) -> Trial | None:
    """Requests that tell of the percentile and of full batches, as far as the time allows; None = it does not
    allow enough.
    """
    stay_s = option.predicted.ttft_s + ask.demand.osl * option.predicted.itl_s
    told = round(_ENOUGH / (1.0 - ask.sla.percentile))
    wanted, fill = max(told, math.ceil(_STAYS * stay_s * rate)), math.ceil(_FILL * stay_s * rate)
    all_in_time = int((left_s - max(_TAIL_S, _FILL * stay_s)) * rate)
    requests = min(wanted, int(all_in_time / (1.0 + _WARM_SHARE)), all_in_time - fill)
    if requests < max(min(_FEWEST, told), math.ceil(stay_s * rate)):
        return None
    return Trial(requests, max(1, fill, round(requests * _WARM_SHARE)))


async def confirm(stage: Stage, ask: Ask, option: Option, rate: float, number: int) -> Confirmed:
    """Start the option, load it, end it. Failures of the service are in the result; ProfileError is of the
    journal.
    """
    row, begun_s = f"confirm {option.label}", time.monotonic()
    key = _key(stage, ask, option, rate)
    known = stage.journal.found(key)
    if known is not None:
        stage.reused += 1
        return msgspec.structs.replace(msgspec.convert(known, Confirmed), reused=True)
    stage.shown.begin(row, 3)
    try:
        stage.shown.step(row, "starting")
        async with stage.standing(option, f"confirm-{number}") as standing:
            if trial_for(ask, option, rate, stage.left_s) is None:
                return _without(option, rate, NO_TIME, begun_s)
            result = await _loaded(stage, ask, (option, rate), (row, number), stage.endpoint(standing))
            stage.shown.step(row, "loaded, ending", done=True)
    except ProfileError:
        raise
    except DynctlError as error:
        if isinstance(error, NotReady) and stage.left_s <= 0.0:
            return _without(option, rate, NO_TIME, begun_s)
        first, lines = lines_of(error)
        return _without(option, rate, "\n".join([first, *lines]), begun_s)
    finally:
        stage.shown.end(row, "")
    found = confirmed(option, rate, result, time.monotonic() - begun_s)
    what, problems = f"confirm {option.label} at {rate:.3g}/s", "; ".join(found.problems)
    stage.journal.answer(key, what, None if problems else found, refused=problems)
    return found


async def _loaded(
    stage: Stage, ask: Ask, tried: tuple[Option, float], row: tuple[str, int], endpoint: Endpoint
) -> Result:
    """What came of the load; of a second one, when the first is not to be relied on and there is time."""
    option, rate = tried
    trial = trial_for(ask, option, rate, stage.left_s)
    assert trial is not None
    for attempt in range(2):
        seed = random.Random(f"{stage.run}/{row[1]}/{attempt}").randrange(1 << 31)
        lasts_s = (trial.requests + trial.warmup) / rate
        doing = f"{trial.requests} requests at {rate:.3g}/s"
        stage.shown.step(row[0], doing, done=not attempt, lasts_s=lasts_s)
        result = (await run(load_for(ask, rate, trial, seed), endpoint, Watch())).result
        stage.probes += 1
        following = trial_for(ask, option, rate, stage.left_s)
        if not result.problems or following is None:
            break
        trial = following
    return result


def _key(stage: Stage, ask: Ask, option: Option, rate: float) -> str:
    made = candidate(stage.asked.loaded, option, "candidate", "")
    basis = [depends_on(made, pool.layout, stage.version, stage.hardware) for pool in option.pools]
    pools = [(pool.role, pool.layout, pool.replicas) for pool in option.pools]
    return key_of("confirm", basis, pools, ask.sla, ask.demand.lengths, ask.demand.hit_rate, f"{rate:.6g}")


def _without(option: Option, rate: float, failure: str, begun_s: float) -> Confirmed:
    return Confirmed(option=option, rate=rate, failure=failure, took_s=time.monotonic() - begun_s)


def confirmed(option: Option, rate: float, result: Result, took_s: float) -> Confirmed:
    """The result of a load as what it tells of the option."""
    share = result.sla.percentile
    return Confirmed(
        option=option,
        rate=rate,
        requests=result.counts.completed,
        ttft_s=_at(result.ttft_s, share),
        itl_s=_at(result.tpot_s, share),
        attainment=result.attainment.value,
        attainment_low=result.attainment.low,
        attainment_high=result.attainment.high,
        goodput=result.goodput.value,
        output_rate=result.output_rate.value,
        meets=result.meets,
        problems=result.problems,
        took_s=took_s,
    )


def _at(figure: Figure | None, share: float) -> float | None:
    return figure.percentiles[label(share)].value if figure is not None else None


def kept(sla: Sla, found: Confirmed) -> bool:
    """Whether what was measured keeps the SLA: TTFT and ITL each at the percentile. Whether that is to be
    relied on, its `problems` tell.
    """
    return found.keeps(sla)


def misses(sla: Sla, found: Confirmed) -> str:
    """What was missed, in words."""
    if found.failure:
        return found.failure.splitlines()[0]
    pairs = (("TTFT", sla.ttft_s, found.ttft_s), ("ITL", sla.itl_s, found.itl_s))
    parts = [
        f"{name} {value * 1000:.3g} ms, {wanted * 1000:.3g} ms wanted"
        for name, wanted, value in pairs
        if wanted is not None and value is not None and value > wanted
    ]
    return ", ".join(parts)


def corrected(
    ask: Ask, profiles: Mapping[Layout, Profile], correction: Correction
) -> dict[Role, dict[Layout, Profile]]:
    """The profiles of each role, as corrected."""
    return {
        role: {
            layout: scaled(
                profile,
                prefill=correction.get(role, (1.0, 1.0))[0],
                decode=correction.get(role, (1.0, 1.0))[1],
            )
            for layout, profile in profiles.items()
        }
        for role in ask.profiles
    }


def explained(
    ask: Ask, profiles: Mapping[Layout, Profile], before: Correction, found: Confirmed
) -> Correction:
    """The correction under which the model predicts what was measured: steps longer by the ITL's share, then
    reading as much longer as the TTFT at that rate and load tells.
    """
    option, predicted = found.option, found.option.predicted
    slower = _factor((found.itl_s or 0.0) / predicted.itl_s) if found.itl_s else 1.0
    after: dict[Role, tuple[float, float]] = dict(before)
    writer, reader = option.pools[-1].role, option.pools[0].role
    first, steps = after.get(writer, (1.0, 1.0))
    missed_itl = ask.sla.itl_s is not None and found.itl_s is not None and found.itl_s > ask.sla.itl_s
    after[writer] = (first, steps * (max(_STEP, slower) if missed_itl else max(1.0, slower)))
    if found.ttft_s is None or ask.sla.ttft_s is None or found.ttft_s <= ask.sla.ttft_s:
        return after
    reading, steps = after.get(reader, (1.0, 1.0))
    low, high = 1.0, _MOST_FACTOR
    for _ in range(12):
        middle = (low + high) / 2.0
        tried = {**after, reader: (reading * middle, steps)}
        ttft_s = _predicted_ttft_s(ask, profiles, tried, found)
        low, high = (middle, high) if ttft_s is not None and ttft_s < found.ttft_s else (low, middle)
    after[reader] = (reading * max(_STEP, low), steps)
    return after


def _factor(value: float) -> float:
    return min(_MOST_FACTOR, max(1.0 / _MOST_FACTOR, value))


def _predicted_ttft_s(
    ask: Ask, profiles: Mapping[Layout, Profile], correction: Correction, found: Confirmed
) -> float | None:
    """TTFT of the option at its rate; None when it could not keep up."""
    option = found.option
    loose = replace(
        ask, profiles=corrected(ask, profiles, correction), sla=Sla(percentile=ask.sla.percentile)
    )
    offers, first, last = Offers(loose), option.pools[0], option.pools[-1]
    if option.mode == "aggregated":
        one = offers.both.get(first.layout)
        both = one.both(found.rate, first.replicas, ask.sla.percentile) if one else None
        return both[0].ttft_s(ask.sla.percentile) if both else None
    reader, writer = offers.readers.get(first.layout), offers.writers.get(last.layout)
    if reader is None or writer is None:
        return None
    talking = offers.writes(writer, found.rate, last.replicas)
    if talking is None:
        return None
    reading = reader.reading(found.rate, first.replicas, offers.after_s(writer), talking.seat)
    return reading.ttft_s(ask.sla.percentile) if reading else None


def note_of(found: Confirmed) -> dict[str, Any]:
    """For people and scripts: measured beside predicted."""
    told: dict[str, Any] = msgspec.to_builtins(found)
    del told["option"]
    return {"label": found.option.label, "predicted": msgspec.to_builtins(found.option.predicted), **told}
