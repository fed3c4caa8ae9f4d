"""What came out of a run. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from dynctl.perfmodel.choice import Sla
from dynctl.perfmodel.simulation import Quantiles, Result
from dynctl.simulator.cluster import Cluster
from dynctl.simulator.desk import Answer
from dynctl.simulator.watch import quantile


def result_of(policy: str, run: Cluster, reasons: Sequence[str] = ()) -> Result:
    """The result of a run that is over."""
    answers, sla, end_s = run.answers, run.service.sla, run.clock.now_s
    done = [one for one in answers if one.end == "done"]
    first = [_in_time(one, sla) for one in answers]
    paced = [_in_pace(one, sla) for one in answers]
    both = sum(map(all, zip(first, paced, strict=True)))
    prompts = sum(one.prompt_tokens for one in run.requests)
    return Result(
        policy=policy,
        requests=len(run.requests),
        done=len(done),
        refused=sum(1 for one in answers if one.end == "refused"),
        aborted=sum(one.scheduler.counters.finished["abort"] for one in run.fleet.engines),
        prompt_tokens=prompts,
        answer_tokens=sum(one.tokens for one in done),
        hit_rate=sum(one.cached for one in answers) / prompts,
        span_s=end_s,
        ttft_met=sum(first) / len(answers),
        itl_met=sum(paced) / len(answers),
        met=both / len(answers),
        goodput=both / end_s if end_s else 0.0,
        ttft_s=_quantiles([one.ttft_s for one in answers]),
        itl_s=_quantiles([one.itl_s for one in answers]),
        gpu_hours=run.fleet.gpu_s(end_s) / 3600.0,
        preemptions=sum(one.scheduler.counters.preemptions for one in run.fleet.engines),
        presence=tuple(run.fleet.presence),
        reasons=tuple(reasons),
    )


def _in_time(answer: Answer, sla: Sla) -> bool:
    ttft_s = answer.ttft_s
    return answer.end == "done" and (sla.ttft_s is None or (ttft_s is not None and ttft_s <= sla.ttft_s))


def _in_pace(answer: Answer, sla: Sla) -> bool:
    itl_s = answer.itl_s
    return answer.end == "done" and (sla.itl_s is None or itl_s is None or itl_s <= sla.itl_s)


def _quantiles(values: Sequence[float | None]) -> Quantiles:
    known = [one for one in values if one is not None]
    if not known:
        return Quantiles()
    p50, p90, p95, p99 = (quantile(known, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Quantiles(mean=fmean(known), p50=p50, p90=p90, p95=p95, p99=p99)
