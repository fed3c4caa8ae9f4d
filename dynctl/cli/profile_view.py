"""A choice of layouts and replicas as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dynctl.cli.render import paint, table
from dynctl.perfmodel.choice import Choice, Option, Refused, Variation
from dynctl.profiler.outcome import NOTHING_MEASURED
from dynctl.profiler.phrases import demand_text, milliseconds, sla_text

_NAMES = {"isl": "prompts", "osl": "answers", "rate": "rate"}


def choice_text(choice: Choice, name: str, doubt: str = "") -> str:
    """All of it. `doubt`: why what is chosen is not to be used yet."""
    return "\n".join([*_head(choice, name), "", *_verdict(choice, doubt), *_sections(choice)])


def _head(choice: Choice, name: str) -> Iterator[str]:
    yield f"{paint(name, 'bold')}  {sla_text(choice.sla)}"
    yield demand_text(choice.demand)


def _verdict(choice: Choice, doubt: str) -> Iterator[str]:
    if choice.chosen is None:
        known = choice.why != NOTHING_MEASURED
        yield f"{paint('✗ nothing keeps this SLA' if known else '✗ no choice', 'error')}: {choice.why}"
        if choice.options:
            yield ""
            yield paint("nearest, with nobody else there", "bold")
            yield _options(choice.options, choice)
            yield from (f"  {option.label}: {'; '.join(option.misses)}" for option in choice.options)
        return
    label, about = choice.chosen.label, f"{choice.chosen.gpus} GPUs, {choice.chosen.mode}"
    if doubt:
        yield f"{paint('? ' + label, 'warning')}  {about}; {doubt}"
    else:
        yield f"{paint('✓ ' + label, 'good')}  {about}"
    for pool in choice.chosen.pools:
        yield (
            f"  {pool.role}: {pool.replicas} x {pool.layout.label}, at most {pool.sequences} sequences and "
            f"{pool.batched_tokens} tokens a step, {pool.load:.0%} busy"
        )
    yield ""
    yield _options(choice.options, choice)


def _options(options: Sequence[Option], choice: Choice) -> str:
    rows = []
    for option in options:
        predicted = option.predicted
        rows.append(
            [
                option.label,
                str(option.gpus),
                milliseconds(predicted.ttft_s),
                milliseconds(predicted.itl_s),
                f"{predicted.capacity:.3g}",
                f"{predicted.tokens_per_s_per_gpu:.0f}",
                f"{predicted.tokens_per_s_per_user:.0f}",
                choice.rank(option),
            ]
        )
    return table(("SPLIT", "GPUS", "TTFT", "ITL", "MAX REQ/S", "TOK/S/GPU", "TOK/S/USER", ""), rows)


def _sections(choice: Choice) -> Iterator[str]:
    if choice.chosen is not None and choice.sensitivity:
        yield ""
        yield paint("if the load were another", "bold")
        yield table(("LOAD", "THIS SPLIT", "THEN BEST"), [_variation(one) for one in choice.sensitivity])
    if choice.refused:
        yield ""
        yield paint("layouts that cannot be", "bold")
        yield table(("LAYOUT", "WHY"), [_refused(one) for one in choice.refused])


def _variation(one: Variation) -> list[str]:
    best = f"{one.option.label} ({one.option.gpus} GPUs)" if one.option else "nothing on these GPUs"
    return [f"{_NAMES[one.what]} {one.factor - 1:+.0%}", "holds" if one.holds else "misses", best]


def _refused(one: Refused) -> list[str]:
    return [f"{one.layout.label} {one.role}".strip(), one.reason]
