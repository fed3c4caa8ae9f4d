"""What a simulation came to, as people and scripts read it. Pure but for colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from dynctl.cli.render import age, paint, table
from dynctl.perfmodel.simulation import Finished, Presence, Quantiles, Result, Task
from dynctl.profiler.phrases import milliseconds, sla_text
from dynctl.protocol.instances import Role

_BARS = " ▁▂▃▄▅▆▇█"
_WIDTH = 60
_NAMES = {
    "planner": "planner",
    "static": "as it is",
    "peak": "for the peak",
    "mean": "for the mean",
    "classic": "classic formula",
    "oracle": "oracle",
}
_NONE = "-"


def results_text(task: Task, found: Sequence[Finished]) -> str:
    """Head, table, replicas over time, what the planner did."""
    first = found[0].result
    prompt, answer = first.prompt_tokens / first.requests, first.answer_tokens / max(1, first.done)
    lines = [
        f"{paint(task.service.name, 'bold')}  {sla_text(task.service.sla)}",
        f"{first.requests} requests in {age(first.span_s)}, on average {prompt:.0f} prompt and {answer:.0f}"
        " answer tokens",
        "",
        _table([one.result for one in found]),
    ]
    if task.compare and not any(one.result.policy == "oracle" for one in found):
        lines += ["", paint("no schedule of replicas keeps this SLA: there is no oracle", "warning")]
    for one in found:
        lines += ["", *_over_time(one.result)]
    planner = found[0].result
    if planner.reasons:
        lines += ["", paint("what the planner did", "bold"), *(f"  {why}" for why in planner.reasons)]
    return "\n".join(lines)


def as_object(task: Task, found: Sequence[Finished]) -> dict[str, Any]:
    """The same for scripts: times in seconds, shares 0 to 1."""
    return {
        "name": task.service.name,
        "sla": msgspec.to_builtins(task.service.sla),
        "boot_s": task.service.boot_s,
        "handover_s": task.service.handover_s,
        "runs": [
            msgspec.to_builtins(one.result) | {"keeps_sla": one.result.keeps(task.service.sla)}
            for one in found
        ],
    }


def pace_text(found: Sequence[Finished]) -> str:
    """How much faster than the clock it was: the only thing told that differs from time to time."""
    one = found[0]
    took_s = max(1e-9, one.took_s)
    return (
        f"simulated {age(one.result.span_s)} in {took_s:.1f}s, {one.result.span_s / took_s:.0f} times as fast"
    )


def _table(results: Sequence[Result]) -> str:
    heads = ["POLICY", "MET", "TTFT", "ITL", "TTFT p50/p95/p99", "ITL p50/p95/p99"]
    heads += ["GOODPUT", "GPU-H", "REFUSED", "ABORTED"]
    return table(heads, [_row(one) for one in results])


def _row(one: Result) -> list[str]:
    return [
        _NAMES.get(one.policy, one.policy),
        f"{one.met:.1%}",
        f"{one.ttft_met:.1%}",
        f"{one.itl_met:.1%}",
        _times(one.ttft_s),
        _times(one.itl_s),
        f"{one.goodput:.2f}/s",
        f"{one.gpu_hours:.2f}",
        str(one.refused),
        str(one.aborted),
    ]


def _times(of: Quantiles) -> str:
    known = [one for one in (of.p50, of.p95, of.p99) if one is not None]
    return " ".join(milliseconds(one) for one in known) or _NONE


def _over_time(one: Result) -> Iterator[str]:
    """A line of bars by role: replicas that are paid for."""
    yield paint(f"replicas over {age(one.span_s)}, {_NAMES.get(one.policy, one.policy)}", "dim")
    roles = list(one.presence[0].there)
    width = max(map(len, roles))
    for role in roles:
        counts = _columns(one.presence, role, one.span_s)
        low, high = min(counts), max(counts)
        span = f"{low:.0f}" if round(low) == round(high) else f"{low:.0f} to {high:.0f}"
        yield f"  {role.ljust(width)}  {sparkline(counts)}  {span}"


def sparkline(counts: Sequence[float]) -> str:
    """Bars from 0 to the highest value; only 0 itself is blank."""
    most = max(counts)
    if most <= 0.0:
        return _BARS[0] * len(counts)
    return "".join(_BARS[max(1, round(count / most * 8)) if count > 0 else 0] for count in counts)


def _columns(presence: Sequence[Presence], role: Role, span_s: float) -> list[float]:
    """Mean replicas in each of the equal parts of the time."""
    part_s = span_s / _WIDTH
    sums = [0.0] * _WIDTH
    ends = [*(one.at_s for one in presence[1:]), span_s]
    for one, end_s in zip(presence, ends, strict=True):
        at_s = one.at_s
        while at_s < end_s - 1e-9:
            place = min(_WIDTH - 1, int(at_s / part_s + 1e-9))
            until_s = end_s if place == _WIDTH - 1 else min(end_s, (place + 1) * part_s)
            sums[place] += one.there[role] * (until_s - at_s)
            at_s = until_s
    return [total / part_s for total in sums]
