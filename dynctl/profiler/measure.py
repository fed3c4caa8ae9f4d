"""A measuring profile run from what is asked to what was found: estimate, measure, choose, confirm.

`measure` is the one way in. Whatever happens, all that it started is ended, and the journal is whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from msgspec import structs

from dynctl.errors import LaunchError
from dynctl.perfmodel.choice import Choice
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import Profile
from dynctl.perfmodel.split import choose
from dynctl.profiler import confirm, search
from dynctl.profiler.outcome import NOTHING_MEASURED, Confirmed, LayoutRun, Measurement
from dynctl.profiler.service import Outcome, ask_of, checked, estimated, require_context
from dynctl.profiler.stage import Stage
from dynctl.profiler.starts import end_marked
from dynctl.profiler.sweep import OUT_OF_TIME, Sweep

_ROUNDS = 3
_FOR_CONFIRMING = 0.35
"""Of the budget: kept back from the probes, at most."""
_MOST_KEPT_S = 600.0
_AT_MOST = 0.97
"""With no rate asked for, what is confirmed is this share of what the split can do."""


@dataclass(slots=True)
class Found:
    """The result: what a report is made of, and the profiles that the choice rests on."""

    measurement: Measurement
    outcome: Outcome

    @property
    def usable(self) -> bool:
        """Whether there is a choice that was not seen to miss the SLA."""
        rounds = self.measurement.rounds
        if self.outcome.choice.chosen is None:
            return False
        if not rounds or rounds[-1].problems:
            return True
        return confirm.kept(self.outcome.choice.sla, rounds[-1])


async def measure(stage: Stage, budget_s: float, *, confirming: bool = True) -> Found:
    """Measure and choose within the budget. Raises ProfileError when nothing can be estimated, or the journal
    cannot be written; LaunchError when something of an earlier run cannot be ended.
    """
    begun_s, at = time.monotonic(), time.time()
    require_context(stage.asked)
    await _end_left(stage)
    profiles, refused = estimated(stage.asked)
    profiles.update(checked(stage.asked.measured, profiles))
    ask = ask_of(stage.asked, profiles, refused)
    estimate = choose(ask)
    stage.ends_s = begun_s + budget_s
    kept_s = min(_MOST_KEPT_S, budget_s * _FOR_CONFIRMING) if confirming else 0.0
    stage.ends_s -= kept_s
    sweep = Sweep(stage, profiles)
    layouts = await sweep.run(search.shortlist(ask))
    stage.ends_s += kept_s
    choice, rounds = await _confirmed(stage, ask, sweep.fits, confirming=confirming)
    if layouts and not sweep.fits:
        choice = structs.replace(choice, why=NOTHING_MEASURED)
    measurement = Measurement(
        run_id=stage.run,
        name=stage.asked.loaded.recipe.name,
        model=stage.asked.loaded.recipe.model.path,
        backend=stage.asked.loaded.recipe.backend,
        at=at,
        took_s=time.monotonic() - begun_s,
        budget_s=budget_s,
        estimate=estimate,
        choice=choice,
        layouts=tuple(layouts),
        rounds=tuple(rounds),
        verdict=verdict(choice, rounds, layouts),
        probes=stage.probes,
        reused=stage.reused,
        gpu_s=stage.gpu_s,
        unmeasured=tuple(run.layout.label for run in layouts if run.stopped.startswith(OUT_OF_TIME)),
    )
    return Found(measurement, Outcome(choice, sweep.fits))


async def _end_left(stage: Stage) -> None:
    """End what earlier runs with this journal have left running, by their ids."""
    left = stage.journal.left
    end_marked({entry.run for entry in left} - {stage.run})
    for entry in left:
        await stage.end(entry.name, well=True)
    if stage.lingering:
        raise LaunchError(f"of an earlier run lives on: {'; '.join(stage.lingering)}")


async def _confirmed(
    stage: Stage, ask: Ask, fits: Mapping[Layout, Profile], *, confirming: bool
) -> tuple[Choice, list[Confirmed]]:
    """The choice from what was measured, and what came of trying it: chosen again while it misses."""
    correction, rounds, barred = confirm.NONE, list[Confirmed](), set[str]()
    choice = _choice(ask, fits, correction, barred)
    while confirming and choice.chosen is not None and len(rounds) < _ROUNDS:
        option = choice.chosen
        rate = choice.demand.rate * (_AT_MOST if ask.most else 1.0)
        if confirm.trial_for(ask, option, rate, stage.left_s) is None:
            break
        found = await confirm.confirm(stage, ask, option, rate, len(rounds))
        if found.failure == confirm.NO_TIME:
            break
        rounds.append(found)
        if confirm.kept(ask.sla, found) or found.problems:
            break  # what is not to be relied on corrects nothing
        if found.ttft_s is None:
            barred.add(option.label)  # it did not run: corrected times would not change that
        else:
            correction = confirm.explained(ask, fits, correction, found)
        choice = _choice(ask, fits, correction, barred)
    return choice, rounds


def _choice(
    ask: Ask, fits: Mapping[Layout, Profile], correction: confirm.Correction, barred: set[str]
) -> Choice:
    """From measured layouts alone, without the splits that did not run."""

    def fits_and_runs(pools: tuple[tuple[Layout, int], ...]) -> bool:
        return ask.fits(pools) and _label(pools) not in barred

    profiles = confirm.corrected(ask, fits, correction)
    return choose(replace(ask, profiles=profiles, fits=fits_and_runs))


def _label(pools: tuple[tuple[Layout, int], ...]) -> str:
    roles = ("prefill", "decode") if len(pools) == 2 else ("aggregated",)
    return " + ".join(f"{n} x {layout.label} {role}" for role, (layout, n) in zip(roles, pools, strict=True))


def verdict(choice: Choice, rounds: list[Confirmed], layouts: list[LayoutRun]) -> str:
    """In one sentence, whether the SLA is kept, or what is instead."""
    sla, last = choice.sla, rounds[-1] if rounds else None
    if last is not None and last.problems:
        seen = "kept" if confirm.kept(sla, last) else "missed"
        return f"not confirmed: {last.option.label} {seen} the SLA, but {'; '.join(last.problems)}"
    if last is not None and confirm.kept(sla, last):
        return f"confirmed: {last.option.label} keeps the SLA at {last.rate:.3g} requests/s"
    if not any(run.fitted for run in layouts):
        first = layouts[0] if layouts else None
        return f"nothing could be measured: {(first.failure or first.stopped) if first else choice.why}"
    if choice.chosen is None:
        missed = f" (tried: {last.option.label}: {confirm.misses(sla, last)})" if last else ""
        return f"the SLA cannot be kept here: {choice.why}{missed}"
    if last is None:
        return f"not confirmed: {choice.chosen.label} rests on the measured layouts alone"
    if last.failure:
        return f"not confirmed: {last.option.label}: {confirm.misses(sla, last)}"
    return f"the SLA was not kept when tried: {last.option.label}: {confirm.misses(sla, last)}; " + _can(last)


def _can(last: Confirmed) -> str:
    parts = [
        f"{name} {value * 1000:.3g} ms"
        for name, value in (("TTFT", last.ttft_s), ("ITL", last.itl_s))
        if value
    ]
    return f"{' and '.join(parts)} were kept at {last.rate:.3g} requests/s"
