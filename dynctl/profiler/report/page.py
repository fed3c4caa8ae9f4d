"""The page of a report: what it says, and the template that says it. All text is escaped by the template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dynctl.observability.logs import timestamp
from dynctl.perfmodel.choice import Option
from dynctl.profiler.outcome import Confirmed, LayoutRun, Measurement
from dynctl.profiler.phrases import demand_text, figure, milliseconds, sla_text, span
from dynctl.profiler.report.marks import Plot
from dynctl.profiler.report.palette import DARK, LIGHT, css
from dynctl.profiler.report.told import Told

_HERE = Path(__file__).parent
_NONE = "-"
_MEETS = {
    "yes": ("yes", "✓ enough"),
    "no": ("no", "✗ too few"),
    "unsure": ("", "too close to tell"),
    "": ("no", "no figures"),
}


def page(told: Told, plots: Sequence[Plot], svg: Callable[[Plot], str], no_plots: str = "") -> str:
    """One HTML document that needs nothing else. `svg` draws a plot; `no_plots`: why none is drawn."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(_HERE),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {
        **_answer(told),
        **_tables(told),
        "title": f"Profile of {told.name}",
        "asked": asked(told),
        "light": Markup(css(LIGHT)),
        "dark": Markup(css(DARK)),
        "css": Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        "plots": [
            {
                "key": plot.key,
                "title": plot.title,
                "caption": plot.caption,
                "svg": "" if no_plots else Markup(svg(plot)),
            }
            for plot in plots
        ],
        "no_plots": no_plots,
        "how_title": "How it was measured" if told.measured else "What it rests on",
        "how": list(_how(told)),
        "version": version("dynctl"),
    }
    return environment.get_template("page.html").render(page=shown)


def asked(told: Told) -> str:
    """The question in a line."""
    return f"{sla_text(told.choice.sla)}, for {demand_text(told.choice.demand)}"


def verdict(told: Told) -> tuple[str, str]:
    """(Tone, sentence): whether the SLA is kept, and who says so."""
    confirmed = told.confirmed
    if told.choice.chosen is None:
        return "bad", "✗ Nothing keeps this SLA"
    if confirmed is None and told.measured is not None and told.measured.rounds:
        tried = told.measured.rounds[-1].option.label
        return "open", f"Not tried: {tried} was, and missed; this is the next choice by what was seen"
    if confirmed is None:
        what = (
            "by measured curves; the whole was not measured"
            if told.runs
            else "by estimate; nothing was measured"
        )
        return "open", f"Should keep the SLA, {what}"
    if confirmed.failure or confirmed.ttft_s is None:
        return "open", f"Not confirmed: {confirmed.failure or 'no first tokens were seen'}"
    if confirmed.problems:
        return "open", f"Not confirmed, the measurement is not to be relied on: {confirmed.problems[0]}"
    if not confirmed.keeps(told.choice.sla):
        return "bad", "✗ Misses the SLA, measured"
    if confirmed.meets == "yes":
        return "good", "✓ Keeps the SLA, measured"
    if confirmed.meets == "no":
        return "open", "TTFT and ITL are each kept, measured, but not both at once by enough requests"
    return "open", "Keeps the SLA, measured, but too close to be sure"


def _answer(told: Told) -> dict[str, Any]:
    chosen, choice = told.choice.chosen, told.choice
    tone, sentence = verdict(told)
    why = told.measured.verdict if told.measured else ""
    heads, rows = _figures(told, chosen) if chosen else ([], [])
    return {
        "tone": tone,
        "verdict": sentence,
        "split": f"{chosen.label}, {_gpus(chosen.gpus)}" if chosen else _nearest(told),
        "why": why or choice.why,
        "figure_heads": heads,
        "figures": rows,
        "next_command": told.next_command,
    }


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _nearest(told: Told) -> str:
    options = told.choice.options
    return f"nearest: {options[0].label}" if options else ""


def _figures(told: Told, chosen: Option) -> tuple[list[str], list[list[str]]]:
    """Asked, predicted and measured beside each other."""
    sla, predicted, confirmed = told.choice.sla, chosen.predicted, told.confirmed
    percentile = f"p{sla.percentile * 100:g}"
    rows = [
        [f"TTFT, {percentile}", _limit(sla.ttft_s), milliseconds(predicted.ttft_s)],
        [f"ITL, {percentile}", _limit(sla.itl_s), milliseconds(predicted.itl_s)],
        ["Requests/s within the SLA", f"{told.choice.demand.rate:.3g}", figure(predicted.capacity)],
        ["Answer tokens/s a GPU", "", figure(predicted.tokens_per_s_per_gpu)],
        ["Answer tokens/s a user", "", figure(predicted.tokens_per_s_per_user)],
    ]
    heads = ["asked", "predicted" if told.runs else "estimated"]
    if confirmed is None or confirmed.failure:
        return heads, rows
    pairs = [
        (confirmed.ttft_s, predicted.ttft_s, milliseconds),
        (confirmed.itl_s, predicted.itl_s, milliseconds),
        (confirmed.goodput, None, figure),
        (_by_gpu(confirmed), predicted.tokens_per_s_per_gpu, figure),
        (1 / confirmed.itl_s if confirmed.itl_s else None, predicted.tokens_per_s_per_user, figure),
    ]
    for row, (value, against, written) in zip(rows, pairs, strict=True):
        row.append(_NONE if value is None else written(value))
        row.append("" if value is None or not against else _difference(value / against - 1))
    return [*heads, f"measured at {confirmed.rate:.3g}/s", "difference"], rows


def _difference(share: float) -> str:
    return f"{share:+.0%}" if abs(share) >= 0.005 else "0%"


def _by_gpu(confirmed: Confirmed) -> float | None:
    return None if confirmed.output_rate is None else confirmed.output_rate / confirmed.option.gpus


def _limit(seconds: float | None) -> str:
    return _NONE if seconds is None else f"≤ {milliseconds(seconds)}"


def _tables(told: Told) -> dict[str, Any]:
    choice, measured = told.choice, told.measured
    pools = choice.chosen.pools if choice.chosen else ()
    return {
        "options_title": "The options beside each other"
        if choice.chosen
        else "What comes nearest, with nobody else there",
        "options": [
            {
                "label": one.label,
                "misses": one.misses,
                "cells": _predicted(one),
                "rank": choice.rank(one),
            }
            for one in told.shown()
        ],
        "pools": [
            {
                "role": pool.role,
                "replicas": pool.replicas,
                "layout": pool.layout.label,
                "cells": [pool.gpus, pool.sequences, f"{pool.batched_tokens:,}", f"{pool.load:.0%}"],
            }
            for pool in pools
        ],
        "rounds": [_round(one) for one in (measured.rounds if measured else ())],
        "runs": [_run(one) for one in told.runs],
        "refused": [(f"{one.layout.label} {one.role}".strip(), one.reason) for one in choice.refused],
    }


def _predicted(option: Option) -> list[str]:
    known = option.predicted
    rates = (known.capacity, known.tokens_per_s_per_gpu)
    return [
        str(option.gpus),
        milliseconds(known.ttft_s),
        milliseconds(known.itl_s),
        *(figure(rate) if rate else _NONE for rate in rates),
        figure(known.tokens_per_s_per_user),
    ]


def _round(one: Confirmed) -> dict[str, Any]:
    style, meets = _MEETS[one.meets]
    predicted = one.option.predicted
    return {
        "label": one.option.label,
        "notes": [note for note in (one.failure, *one.problems) if note],
        "cells": [
            f"{one.rate:.3g}",
            str(one.requests) if one.requests else _NONE,
            milliseconds(predicted.ttft_s),
            _NONE if one.ttft_s is None else milliseconds(one.ttft_s),
            milliseconds(predicted.itl_s),
            _NONE if one.itl_s is None else milliseconds(one.itl_s),
            _attained(one),
        ],
        "style": style,
        "meets": meets,
    }


def _attained(one: Confirmed) -> str:
    if one.attainment is None:
        return _NONE
    if one.attainment_low is None or one.attainment_high is None:
        return f"{one.attainment:.1%}"
    return f"{one.attainment:.1%} ({one.attainment_low:.1%} to {one.attainment_high:.1%})"


def _run(one: LayoutRun) -> dict[str, Any]:
    again = sum(p.reused for p in one.prefill) + sum(p.reused for p in one.decode)
    end = one.stopped or ("measured, but for" if one.refused else "all points measured")
    return {
        "label": one.layout.label,
        "cells": [
            span(one.start_s) if one.start_s else _NONE,
            len(one.prefill),
            len(one.decode),
            again or _NONE,
            span(one.took_s) if one.took_s else _NONE,
        ],
        "failure": one.failure,
        "end": end,
        "refused": [f"{probe.what} refused: {probe.reason}" for probe in one.refused],
        "lines": "\n".join(one.lines),
    }


def _how(told: Told) -> Iterator[tuple[str, str]]:
    """What anyone would need to do it again, or to doubt it."""
    yield "Recipe", told.recipe
    subject = next((one.subject for one in told.profiles.values() if one.subject), None)
    measured = told.measured
    if subject is not None:
        yield "Model", " ".join(filter(None, (subject.model, subject.precision)))
        yield "Engine", " ".join(filter(None, (subject.backend, subject.backend_version)))
        yield "Hardware", subject.hardware or "not told"
    elif measured is not None:
        yield "Model", measured.model
        yield "Engine", measured.backend
    if told.gpus:
        yield "GPUs to choose for", str(told.gpus)
    if measured is None:
        sources = sorted({one.source or "given" for one in told.profiles.values()})
        yield "Layouts looked at", f"{len(told.profiles)}, costs: {', '.join(sources) or 'none'}"
        yield "Seeds", "none: nothing is drawn by chance"
        return
    yield from _measuring(measured)


def _measuring(measured: Measurement) -> Iterator[tuple[str, str]]:
    yield "Run", f"{measured.run_id}, begun {timestamp(measured.at)}"
    yield (
        "Time",
        f"{span(measured.took_s)} of {span(measured.budget_s)} allowed, "
        f"{span(measured.gpu_s)} of one GPU in all",
    )
    again = f", {measured.reused} more from the journal of an earlier run" if measured.reused else ""
    yield "Probes", f"{measured.probes}{again}"
    points = [point for run in measured.layouts for point in run.prefill]
    steps = sum(point.steps for run in measured.layouts for point in run.decode)
    if points or steps:
        yield "Samples", f"{sum(point.requests for point in points)} prompts, {steps} decode steps"
    cached = [p.cached for run in measured.layouts for p in run.decode if p.cached is not None]
    if cached:
        yield "Cached when steps were timed", f"{min(cached):.1%} of the prompt tokens at least, as is meant"
    yield "Seeds", "of each probe: the run that took it, the layout, the probe; of the choice: none"
    before = measured.estimate.chosen
    if before is not None:
        yield "Estimated before measuring", before.label
    for what in measured.unmeasured:
        yield "Left open by the budget", what
