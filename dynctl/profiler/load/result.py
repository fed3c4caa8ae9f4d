"""What came of a load: from the records of its requests to figures, and whether they are to be trusted. Pure.

Definitions (the same as AIPerf's and `vllm bench serve`'s): TTFT first piece that is not empty - send; E2E
last piece - send; TPOT of a request (E2E - TTFT) / (answer tokens - 1); ITL all gaps between pieces; goodput
the rate of requests that meet every part of the SLA, each by its own TTFT and TPOT.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Literal

import msgspec

from dynctl.perfmodel.choice import Sla
from dynctl.profiler.load.lag import LEAST_LAG_S, ClientLoad
from dynctl.profiler.load.record import Record
from dynctl.profiler.load.spec import Load, Open, Replay
from dynctl.profiler.load.statistics import Estimate, Figure, figure, mean_of_slices, proportion

SLICES = 10
_FEW = 0.01
_OFF = 0.05
"""Prompts may be so much longer or shorter than asked for, and that much of them cached by accident."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the warm-up left out. `late`: sent noticeably after their time; `short`: answers with fewer
    tokens than asked for; `interrupted`: in flight when the load was stopped; `uncounted`: answers of which
    the server told no token counts.
    """

    offered: int
    completed: int
    failed: int
    interrupted: int
    late: int
    short: int
    uncounted: int
    warmup: int


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A measured load. Times in seconds, rates a second; None where there is nothing to tell.

    `window_s`: from the first counted send to the last counted end. `attainment`: share of requests, failed
    ones included, that met the SLA (all that completed, without one); `meets`: whether that is the share the
    SLA asks for, "unsure" when its interval holds it. `goodput`: the rate of those, `output_rate` tokens a
    second, with intervals from slices of time. `cached`: share of prompt tokens that the server had in its
    cache. `problems`: why this is not to be trusted; a probe is valid without any.
    """

    counts: Counts
    window_s: float
    request_rate: float
    input_rate: float
    output_rate: Estimate
    goodput: Estimate
    attainment: Estimate
    meets: Literal["yes", "no", "unsure", ""]
    ttft_s: Figure | None
    itl_s: Figure | None
    tpot_s: Figure | None
    e2e_s: Figure | None
    input_tokens: Figure | None
    output_tokens: Figure | None
    cached: float | None
    client: ClientLoad
    sla: Sla
    seed: int
    errors: dict[str, int]
    problems: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """Whether it may be used."""
        return not self.problems


def meets_sla(record: Record, sla: Sla) -> bool:
    """Whether a request met all parts of the SLA; one of a single token has no TPOT to miss it by."""
    if not record.completed:
        return False
    tpot_s = record.tpot_s
    return (sla.ttft_s is None or record.ttft_s <= sla.ttft_s) and (
        sla.itl_s is None or tpot_s is None or tpot_s <= sla.itl_s
    )


def summed_up(load: Load, records: Sequence[Record], client: ClientLoad) -> Result:
    """The result of a load's records, in any order; the warm-up's are those with the lowest numbers. A load
    that is to `settle` still is one that has not.
    """
    counted = [record for record in records if record.number >= load.warmup]
    done = [record for record in counted if record.completed]
    sla = load.sla
    begin_s = min((record.sent_s for record in counted), default=0.0)
    window_s = max((record.end_s for record in counted), default=0.0) - begin_s
    good = [record for record in done if meets_sla(record, sla)]
    judged = [record for record in counted if not record.interrupted]
    attainment = proportion(len(good), len(judged))
    tpots = [value for record in done if (value := record.tpot_s) is not None]
    slices = _slices(done, begin_s, window_s)
    result = Result(
        counts=_counts(load, records, counted),
        window_s=window_s,
        request_rate=_rate(len(done), window_s),
        input_rate=_rate(sum(record.input_tokens for record in done), window_s),
        output_rate=mean_of_slices([sum(r.output_tokens for r in one) / window_s * SLICES for one in slices]),
        goodput=mean_of_slices([sum(meets_sla(r, sla) for r in one) / window_s * SLICES for one in slices]),
        attainment=attainment,
        meets=_meets(attainment, sla, len(judged)),
        ttft_s=figure([record.ttft_s for record in done], also=sla.percentile),
        itl_s=figure(
            [gap for r in done for gap in r.gaps_s], independent=max(1, len(tpots)), also=sla.percentile
        ),
        tpot_s=figure(tpots, also=sla.percentile),
        e2e_s=figure([record.e2e_s for record in done], also=sla.percentile),
        input_tokens=figure([record.input_tokens for record in done if record.counted]),
        output_tokens=figure([record.output_tokens for record in done]),
        cached=_cached(done),
        client=client,
        sla=sla,
        seed=load.seed,
        errors=dict(Counter(record.error for record in counted if record.error).most_common()),
        problems=(),
    )
    return msgspec.structs.replace(result, problems=tuple(_problems(load, result, done)))


def _rate(count: float, window_s: float) -> float:
    return count / window_s if window_s > 0 else 0.0


def _slices(done: Sequence[Record], begin_s: float, window_s: float) -> list[list[Record]]:
    """Completed requests by the tenth of the window in which they ended; [] when there was no time."""
    found: list[list[Record]] = [[] for _ in range(SLICES)]
    if window_s <= 0:
        return []
    for record in done:
        found[min(SLICES - 1, int((record.end_s - begin_s) / window_s * SLICES))].append(record)
    return found


def _counts(load: Load, records: Sequence[Record], counted: Sequence[Record]) -> Counts:
    done = [record for record in counted if record.completed]
    return Counts(
        offered=len(counted),
        completed=len(done),
        failed=sum(bool(record.error) for record in counted),
        interrupted=sum(record.interrupted for record in counted),
        late=sum(record.late_s > _late_limit_s(load, done) for record in counted) if _timed(load) else 0,
        short=sum(record.output_tokens < record.asked_output for record in done if record.counted),
        uncounted=sum(not record.counted for record in done),
        warmup=len(records) - len(counted),
    )


def _timed(load: Load) -> bool:
    return isinstance(load.arrivals, Open | Replay)


def _late_limit_s(load: Load, done: Sequence[Record]) -> float:
    """A send is late when that spoils the TTFT by more than a twentieth."""
    ttft_s = load.sla.ttft_s or (median(record.ttft_s for record in done) if done else 0.0)
    return max(LEAST_LAG_S, ttft_s / 20)


def _meets(attainment: Estimate, sla: Sla, count: int) -> Literal["yes", "no", "unsure", ""]:
    if (sla.ttft_s is None and sla.itl_s is None) or not count:
        return ""
    assert attainment.low is not None
    assert attainment.high is not None
    if attainment.low <= sla.percentile <= attainment.high:
        return "unsure"
    return "yes" if attainment.value >= sla.percentile else "no"


def _cached(done: Sequence[Record]) -> float | None:
    told = [record for record in done if record.cached_tokens is not None and record.input_tokens]
    if not told:
        return None
    return sum(record.cached_tokens or 0 for record in told) / sum(record.input_tokens for record in told)


def _problems(load: Load, result: Result, done: Sequence[Record]) -> list[str]:
    """Reasons, in words, why a result is not to be used."""
    counts, found = result.counts, []
    if not done:
        found.append("no request completed")
    if counts.failed:
        often = next(iter(result.errors))
        found.append(f"{counts.failed} of {counts.offered} requests failed, most often: {often}")
    if counts.interrupted:
        found.append(f"it was stopped with {counts.interrupted} requests in flight")
    if counts.uncounted:
        found.append(
            f"{counts.uncounted} answers came without usage: tokens were counted as pieces of the stream"
        )
    if load.ignore_eos and counts.short > _FEW * len(done):
        found.append(f"{counts.short} of {len(done)} answers ended before as many tokens as asked for")
    found += _off(done, load)
    found += _by_accident(load, result)
    if load.settle:
        found.append(
            f"batches were still filling when the {counts.warmup} requests to warm up were over: --warmup or "
            "--duration must be longer, or the service cannot keep up with the rate"
        )
    if counts.late > _FEW * counts.offered:
        found.append(f"{counts.late} of {counts.offered} requests were sent after their time")
    if done:
        bottleneck = result.client.bottleneck(_finest_s(result))
        found += [bottleneck] if bottleneck else []
    return found


def _off(done: Sequence[Record], load: Load) -> list[str]:
    """Prompts that are not as long as asked for; a conversation's later turns carry more."""
    first = [record for record in done if record.counted and record.turn == 0]
    if not first:
        return []
    asked, was = fmean(r.asked_input for r in first), fmean(r.input_tokens for r in first)
    if abs(was - asked) <= max(2.0, _OFF * asked):
        return []
    return [f"prompts were {was:.0f} tokens on average instead of {asked:.0f}"]


def _by_accident(load: Load, result: Result) -> list[str]:
    """Prompts that were in the server's cache though nothing of the load is shared."""
    if result.cached is None or load.repeated or load.turns > 1 or isinstance(load.arrivals, Replay):
        return []
    shared = load.shared_tokens / load.isl.tokens
    over = result.cached - shared
    if over <= _OFF:
        return []
    return [f"{result.cached:.0%} of the prompts' tokens were in the server's cache: use another seed"]


def _finest_s(result: Result) -> float:
    """The shortest span that is judged: to the first token, or from there to the last (TPOT is a part of it);
    as the SLA allows it, else the median.
    """
    spans = []
    if result.ttft_s is not None:
        spans.append(result.sla.ttft_s or result.ttft_s.percentiles["p50"].value)
    if result.tpot_s is not None and result.output_tokens is not None:
        tpot_s = result.sla.itl_s or result.tpot_s.percentiles["p50"].value
        spans.append(tpot_s * max(1.0, result.output_tokens.mean - 1))
    return min(spans, default=math.inf)
