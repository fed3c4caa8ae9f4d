"""Which probe next: enough of what may win, nothing of what cannot."""

from __future__ import annotations

import msgspec
import pytest

from dynctl.perfmodel.choice import Demand, Sla
from dynctl.perfmodel.fit import scaled
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile
from dynctl.perfmodel.traffic import traffic
from dynctl.profiler.outcome import DecodePoint, PrefillPoint
from dynctl.profiler.search import (
    MOST_DECODES,
    decode_probes,
    fitted,
    largest,
    next_decode,
    prefill_probes,
    shortlist,
    worth,
)

LIMITS = Limits(kv_tokens=200_000, sequences=256, batched_tokens=8192)
BASE = msgspec.structs.replace(DEFAULT, limits=LIMITS)
DEMAND = Demand(rate=10.0, lengths=((2000, 200),))
MIX = traffic(DEMAND)
TP1, TP2, TP4, TP8 = (Layout(tensor=size) for size in (1, 2, 4, 8))
PROFILES = {
    TP1: scaled(BASE, prefill=1.0, decode=1.0),
    TP2: scaled(BASE, prefill=0.55, decode=0.7),
    TP4: scaled(BASE, prefill=0.32, decode=0.55),
    TP8: scaled(BASE, prefill=0.3, decode=0.54),
}


def ask(sla: Sla, gpus: int = 16) -> Ask:
    return Ask(
        sla=sla,
        demand=DEMAND,
        profiles={"prefill": PROFILES, "decode": PROFILES, "aggregated": PROFILES},
        gpus=gpus,
        most=True,
    )


def bisected(truth: Profile, itl_s: float | None, estimate: Profile = BASE) -> list[DecodePoint]:
    """All decode points of a layout that costs `truth`."""
    seen: list[DecodePoint] = []
    for first in decode_probes(estimate, MIX, itl_s):
        seen.append(point(truth, first.batch, first.context))
    while (probe := next_decode(fitted(estimate, (), seen, 1.0), seen, MIX, itl_s)) is not None:
        seen.append(point(truth, probe.batch, probe.context))
    return seen


def point(truth: Profile, batch: int, context: float) -> DecodePoint:
    return DecodePoint(batch=batch, context=context, seconds=truth.decode_s(batch, context), steps=30)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_the_largest_batch_is_found_however_wrong_the_estimate_was(factor: float) -> None:
    truth = scaled(BASE, decode=factor)
    seen = bisected(truth, 0.02)
    assert len(seen) <= MOST_DECODES
    best = max(one.batch for one in seen if one.seconds <= 0.02)
    real = max(n for n in range(1, 257) if truth.decode_s(n, MIX.context) <= 0.02 and n <= 95)
    assert best >= 0.85 * min(real, largest(BASE, MIX.context))


def test_one_point_is_at_half_the_context() -> None:
    seen = bisected(scaled(BASE, decode=1.3), 0.02)
    assert any(one.context < MIX.context * 0.6 and one.batch > 1 for one in seen)


def test_when_one_answer_alone_is_too_slow_nothing_more_is_measured() -> None:
    seen = bisected(scaled(BASE, decode=9.0), 0.02)
    assert len(seen) == 2


def test_without_an_itl_the_largest_batch_is_what_fits() -> None:
    seen = bisected(BASE, None)
    assert max(one.batch for one in seen) == largest(BASE, MIX.context) == 95


def test_prompts_are_short_usual_and_long_within_the_models_context() -> None:
    assert [p.isl for p in prefill_probes(DEMAND, 0)] == [500, 2000, 2500]
    assert [p.isl for p in prefill_probes(DEMAND, 2100)] == [500, 2000, 2099]
    assert [p.isl for p in prefill_probes(Demand(rate=1.0, lengths=((8, 8),)), 0)] == [8, 10]


def test_the_shortlist_holds_the_best_and_the_next_best_of_each_role_but_not_all() -> None:
    found = shortlist(ask(Sla(ttft_s=0.3, itl_s=0.02)))
    assert TP1 in found
    assert TP2 in found
    assert TP8 not in found


def test_what_the_estimate_thinks_hopeless_is_measured_at_its_fastest() -> None:
    assert shortlist(ask(Sla(ttft_s=0.001, itl_s=0.02))) == (TP8,)


def test_a_layout_is_left_when_even_fifteen_percent_more_would_not_do() -> None:
    question = ask(Sla(ttft_s=0.3, itl_s=0.02))
    slow = {TP1: PROFILES[TP1], TP8: scaled(PROFILES[TP8], prefill=2.0, decode=2.0)}
    assert worth(question, slow, TP1)
    assert not worth(question, slow, TP8)
    assert worth(question, {TP8: slow[TP8]}, TP8)


def test_measured_prompts_of_several_steps_are_fitted_as_such() -> None:
    estimate = msgspec.structs.replace(BASE, limits=msgspec.structs.replace(LIMITS, batched_tokens=1024))
    points = [
        PrefillPoint(isl=n, seconds=-(-n // 1024) * 0.05 + n * 1e-4, low_s=0, high_s=0, requests=5)
        for n in (500, 2000, 4000)
    ]
    found = fitted(estimate, points, (), 100.0)
    assert found.prefill.seconds[0] == pytest.approx(0.05, rel=0.05)
