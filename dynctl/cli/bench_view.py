"""What is shown of a load: how far it is, and what came of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from dynctl.cli.render import age, paint, prose, table
from dynctl.cli.top_view import duration
from dynctl.perfmodel.choice import Sla
from dynctl.profiler.load.result import Result
from dynctl.profiler.load.run import Watch
from dynctl.profiler.load.spec import Closed, Lengths, Load, Open, Replay
from dynctl.profiler.load.statistics import Estimate, Figure, label

_LINE_EVERY_S = 10.0
_NONE = "-"


class Progress:
    """How far a load is, on standard error: a bar with the time that is left on a terminal, else a line now
    and then. Entered and left around the load.
    """

    def __init__(self, load: Load, name: str) -> None:
        self._load, self._name = load, name
        self._total = load.total * load.turns
        self._drawn: Any = None
        self._row: Any = None
        self._told_s = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            self._drawn.stop()

    def show(self, watch: Watch) -> None:
        """As it is now."""
        passed_s = time.perf_counter() - watch.begun_s if watch.begun_s else 0.0
        done = len(watch.records)
        text = f"{watch.phase}  {done} done, {watch.in_flight} in flight"
        failed = sum(bool(record.error) for record in watch.records)
        text += f", {failed} failed" if failed else ""
        if self._drawn is not None:
            share = part_done(self._load, done - watch.more, passed_s)
            self._drawn.update(self._row, completed=share * 100, told=text)
        elif time.monotonic() - self._told_s > _LINE_EVERY_S:
            self._told_s = time.monotonic()
            left_s = time_left_s(self._load, done - watch.more, passed_s)
            prose(f"{self._name}: {text}" + ("" if left_s is None else f", {age(left_s)} left"))

    def _draw(self) -> None:
        from rich import progress
        from rich.console import Console

        self._drawn = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=30),
            progress.TaskProgressColumn(),
            progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            progress.TextColumn("[dim]{task.fields[told]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._row = self._drawn.add_task(self._name, total=100, told="fitting prompts")
        self._drawn.start()


def part_done(load: Load, done: int, passed_s: float) -> float:
    """Which part of a load is behind, 0..1: of its requests or its time, whichever is further."""
    total = load.total * load.turns
    by_count = max(0.0, done / total) if total else 0.0
    by_time = passed_s / load.duration_s if load.duration_s else 0.0
    return min(1.0, max(by_count, by_time))


def time_left_s(load: Load, done: int, passed_s: float) -> float | None:
    """Seconds to go if it goes on like this; None while that cannot be told."""
    part = part_done(load, done, passed_s)
    return passed_s / part * (1 - part) if part > 0 else None


def headline(name: str, load: Load) -> str:
    """The load in one line."""
    parts = [name, load.api, _rhythm(load)]
    if not isinstance(load.arrivals, Replay):
        parts += [f"{_lengths(load.isl)} tokens in", f"{_lengths(load.osl)} out"]
    parts += [f"{load.shared_tokens} of them shared by {load.prefixes}"] if load.shared_tokens else []
    parts += [f"{load.turns} turns"] if load.turns > 1 else []
    return "  ".join([paint(parts[0], "bold"), *parts[1:], paint(f"seed {load.seed}", "dim")])


def lines(name: str, load: Load, result: Result) -> list[str]:
    """A result for people."""
    judged = label(load.sla.percentile)
    shown = [headline(name, load), ""]
    shown += [
        table(("", "MEAN", "P50", "P90", "P95", "P99", "MAX", f"{judged} IS WITHIN"), _times(result)),
        "",
    ]
    shown += [f"{paint(head.ljust(9), 'dim')} {text}" for head, text in _facts(load, result)]
    return shown


def next_step(load: Load, result: Result) -> str:
    """What to do with it."""
    if result.problems:
        return "not to be relied on until that is gone"
    closed = isinstance(load.arrivals, Closed)
    more = (
        "a higher --concurrency"
        if closed
        else "a higher --rate"
        if isinstance(load.arrivals, Open)
        else "a higher --speedup"
    )
    match result.meets:
        case "" if closed:
            return f"next: {more} until tokens/s stay, or --sla ttft=200ms,itl=20ms with --rate"
        case "":
            return "next: --sla ttft=200ms,itl=20ms tells how many requests are served well"
        case "unsure":
            return "next: more --requests, to tell whether the SLA is met"
        case "yes":
            hidden = "; --rate shows the queueing that a closed loop hides" if closed else ""
            return f"next: {more}, to find where the SLA ends{hidden}"
    return "next: less load, more replicas, or dynctl profile, which looks for what meets it"


def sla_words(sla: Sla) -> str:
    """TTFT ≤ 200ms, ITL ≤ 20ms for 95%."""
    bounds = (("TTFT", sla.ttft_s), ("ITL", sla.itl_s))
    wanted = ", ".join(f"{name} ≤ {duration(bound)}" for name, bound in bounds if bound is not None)
    return f"{wanted} for {sla.percentile * 100:g}%"


def _rhythm(load: Load) -> str:
    match load.arrivals:
        case Closed(concurrency=concurrency):
            return f"{concurrency} in flight"
        case Open(rate=rate, burstiness=calm):
            law = "evenly" if calm is None else "Poisson" if calm == 1 else f"gamma {calm:g}"
            return f"{rate:g} requests/s, {law}"
        case Replay(requests=requests, speedup=speedup):
            return f"{len(requests)} requests of a trace" + (
                f", {speedup:g} times as fast" if speedup != 1 else ""
            )


def _lengths(lengths: Lengths) -> str:
    return f"{lengths.tokens}" + (f" ± {lengths.spread:.0%}" if lengths.spread else "")


def _times(result: Result) -> list[list[str]]:
    figures = (("TTFT", result.ttft_s), ("TPOT", result.tpot_s), ("ITL", result.itl_s), ("E2E", result.e2e_s))
    return [[name, *_cells(found, label(result.sla.percentile))] for name, found in figures]


def _cells(found: Figure | None, judged: str) -> list[str]:
    if found is None:
        return [_NONE] * 7
    told = found.percentiles
    names = ("p50", "p90", "p95", "p99")
    return [
        duration(found.mean),
        *(duration(told[name].value) for name in names),
        duration(found.max),
        _between(told[judged]),
    ]


def _between(found: Estimate) -> str:
    if found.low is None or found.high is None:
        return "too few to tell"
    return f"{duration(found.low)} .. {duration(found.high)}"


def _facts(load: Load, result: Result) -> list[tuple[str, str]]:
    counts, client = result.counts, result.client
    asked = f"{counts.completed} of {counts.offered} completed in {age(result.window_s)}"
    asked += f", {counts.warmup} before them to warm up" if counts.warmup else ""
    asked += f", {counts.late} sent late" if counts.late else ""
    served = f"{result.request_rate:.2f} requests/s, {_rate(result.output_rate)} tokens/s out"
    served += f", {result.input_rate:,.0f} in"
    found = [("requests", asked), ("served", served), ("lengths", _measured_lengths(result))]
    if result.meets:
        found += [("SLA", _sla(result)), ("goodput", f"{_rate(result.goodput)} requests/s meet it")]
    lag = f"late by {duration(client.lag_p95_s)} (p95), {client.cpu:.0%} of a core"
    found.append(("client", lag))
    return found


def _measured_lengths(result: Result) -> str:
    given, said = result.input_tokens, result.output_tokens
    parts = [f"{given.mean:.0f} tokens in" if given is not None else "tokens in not told"]
    parts += [f"{said.mean:.0f} out"] if said is not None else []
    parts += [f"{result.cached:.0%} of those in were cached"] if result.cached is not None else []
    return ", ".join(parts)


def _sla(result: Result) -> str:
    met = result.attainment
    style = {"yes": "good", "no": "error", "unsure": "warning"}
    said = {"yes": "met", "no": "not met", "unsure": "cannot be told yet"}[result.meets]
    shown = paint(said, style[result.meets])  # type: ignore[arg-type]  # three styles
    share = f"{met.value:.1%} of requests"
    if met.low is not None and met.high is not None:
        share += f" ({met.low:.1%} .. {met.high:.1%})"
    return f"{sla_words(result.sla)}: {shown}, {share} got it"


def _rate(found: Estimate) -> str:
    digits = ",.0f" if found.value >= 100 else ".2f"
    if found.low is None or found.high is None:
        return f"{found.value:{digits}}"
    return f"{found.value:{digits}} ± {(found.high - found.low) / 2:{digits}}"


def problems(found: Sequence[str]) -> None:
    """Tell why a result is not to be trusted."""
    for problem in found:
        prose(problem, style="warning")
