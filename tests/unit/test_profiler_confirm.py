"""What a whole split was seen to do, held against what was predicted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from dynctl.perfmodel.choice import Demand, Option, Sla
from dynctl.perfmodel.fit import scaled
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import DEFAULT, Limits
from dynctl.perfmodel.split import choose
from dynctl.perfmodel.trace import TraceRequest
from dynctl.profiler.confirm import (
    NONE,
    Trial,
    corrected,
    explained,
    kept,
    load_for,
    misses,
    trial_for,
)
from dynctl.profiler.load.schedule import arrivals
from dynctl.profiler.load.spec import Open, Replay, check
from dynctl.profiler.measure import verdict
from dynctl.profiler.outcome import Confirmed, LayoutRun

LIMITS = Limits(kv_tokens=200_000, sequences=256, batched_tokens=8192)
PROFILES = {Layout(): msgspec.structs.replace(DEFAULT, limits=LIMITS)}
SLA = Sla(ttft_s=0.6, itl_s=0.02)


def ask(rate: float = 20.0, lengths: tuple[tuple[int, int], ...] = ((2000, 200),)) -> Ask:
    roles = ("prefill", "decode", "aggregated")
    return Ask(
        sla=SLA,
        demand=Demand(rate=rate, lengths=lengths),
        profiles=dict.fromkeys(roles, PROFILES),  # type: ignore[arg-type]
        gpus=16,
    )


def chosen(question: Ask) -> Option:
    option = choose(question).chosen
    assert option is not None
    return option


def seen(option: Option, *, ttft: float = 1.0, itl: float = 1.0) -> Confirmed:
    predicted = option.predicted
    return Confirmed(
        option=option,
        rate=20.0,
        requests=300,
        ttft_s=predicted.ttft_s * ttft,
        itl_s=predicted.itl_s * itl,
    )


def test_the_sla_is_kept_only_when_both_times_are() -> None:
    option = chosen(ask())
    good = seen(option)
    assert kept(SLA, good)
    late = msgspec.structs.replace(good, ttft_s=0.7)
    assert not kept(SLA, late)
    assert misses(SLA, late) == "TTFT 700 ms, 600 ms wanted"
    assert not kept(SLA, msgspec.structs.replace(good, itl_s=0.03))
    assert not kept(SLA, Confirmed(option=option, rate=1.0, failure="it did not start"))


def test_what_was_seen_is_explained_by_slower_engines_and_another_split_is_chosen() -> None:
    question = ask()
    option = chosen(question)
    slow = {k: scaled(v, prefill=1.4, decode=1.3) for k, v in PROFILES.items()}
    truth = replace(question, profiles=dict.fromkeys(question.profiles, slow))
    found = Confirmed(option=option, rate=20.0, requests=300, ttft_s=2.0, itl_s=0.026)
    correction = explained(question, PROFILES, NONE, found)
    again = choose(replace(question, profiles=corrected(question, PROFILES, correction))).chosen
    assert again is not None
    assert again.label != option.label
    right = chosen(truth)
    assert abs(again.gpus - right.gpus) <= 1


def test_a_miss_never_leads_to_the_same_prediction_again() -> None:
    question = ask()
    option = chosen(question)
    found = msgspec.structs.replace(seen(option), ttft_s=SLA.ttft_s * 1.0001 if SLA.ttft_s else None)
    correction = explained(question, PROFILES, NONE, found)
    assert max(factor for pair in correction.values() for factor in pair) >= 1.03


def test_arrivals_are_poisson_for_equal_lengths_and_for_a_mix() -> None:
    same = check(load_for(ask(), 5.0, Trial(300, 30), 1))
    assert isinstance(same.arrivals, Open)
    mixed = check(load_for(ask(lengths=((100, 10), (3000, 50))), 5.0, Trial(300, 30), 1))
    assert isinstance(mixed.arrivals, Replay)
    times = list(arrivals(mixed))
    assert len(times) == 330
    assert times[-1] == pytest.approx(330 / 5.0, rel=0.25)
    assert {r.prompt_tokens for r in mixed.arrivals.requests} == {100, 3000}


def lasting(stay_s: float) -> Option:
    """An option whose requests stay so long, by its prediction."""
    option = chosen(ask())
    itl_s = stay_s / ask().demand.osl
    return msgspec.structs.replace(
        option, predicted=msgspec.structs.replace(option.predicted, ttft_s=0.0, itl_s=itl_s)
    )


def test_a_percentile_is_not_judged_by_too_few_requests() -> None:
    short = lasting(0.1)
    assert trial_for(ask(), short, 10.0, 3600.0) == (300, 30)
    assert trial_for(ask(), short, 10.0, 34.0) == (127, 13)
    assert trial_for(ask(), short, 10.0, 21.0) is None
    half = replace(ask(), sla=Sla(ttft_s=1.0, percentile=0.5))
    assert trial_for(half, short, 10.0, 3600.0) == (30, 3)


def test_a_trial_is_not_over_before_the_batches_are_full() -> None:
    """At 35 requests a second that stay for 3 s, 30 of them see batches that are far from full."""
    half = replace(ask(), sla=Sla(itl_s=0.03, percentile=0.5))
    trial = trial_for(half, lasting(3.0), 35.0, 3600.0)
    assert trial == (5 * 3 * 35, 2 * 3 * 35)
    shorter = trial_for(half, lasting(3.0), 35.0, 35.0)
    assert shorter is not None
    assert 105 <= shorter.requests < 525
    assert trial_for(half, lasting(3.0), 35.0, 28.0) is None


def test_prompts_of_a_mix_have_in_common_what_the_demand_says() -> None:
    """Else a trial of a trace reads prompts that the choice takes for cached."""
    question = ask(lengths=((4000, 50), (1000, 100)))
    question = replace(question, demand=msgspec.structs.replace(question.demand, hit_rate=0.75))
    load = check(load_for(question, 5.0, Trial(300, 30), 1))
    assert isinstance(load.arrivals, Replay)
    assert hit_rate(load.arrivals.requests, load.arrivals.block_tokens) == pytest.approx(0.75, abs=0.03)


def hit_rate(requests: Sequence[TraceRequest], size: int) -> float:
    """Of all but the first of each block."""
    found = sum(len(one.blocks) * size for one in requests[1:])
    return found / sum(one.prompt_tokens for one in requests[1:])


def test_the_verdict_says_what_was_kept_instead() -> None:
    option = chosen(ask())
    late = msgspec.structs.replace(seen(option), ttft_s=0.7, itl_s=0.015)
    runs = [LayoutRun(layout=Layout(), estimated=PROFILES[Layout()], fitted=PROFILES[Layout()])]
    told = verdict(choose(ask()), [late], runs)
    assert "the SLA was not kept when tried" in told
    assert "TTFT 700 ms and ITL 15 ms were kept at 20 requests/s" in told
    assert verdict(choose(ask()), [seen(option)], runs).startswith("confirmed")
    assert verdict(choose(ask()), [], runs).startswith("not confirmed")
    broken = msgspec.structs.replace(runs[0], fitted=None, failure="the engine ended")
    assert verdict(choose(ask()), [], [broken]) == "nothing could be measured: the engine ended"
    hung = msgspec.structs.replace(broken, failure="", stopped="it serves nothing: no end after 15 s")
    assert verdict(choose(ask()), [], [hung]).endswith("it serves nothing: no end after 15 s")
