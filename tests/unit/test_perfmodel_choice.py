"""The values that profiling, planning and simulating share."""

from __future__ import annotations

from dynctl.perfmodel.choice import Demand, Option, Pool, Prediction
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.profile import Subject

PREDICTED = Prediction(
    ttft_s=0.1, itl_s=0.01, capacity=5.0, tokens_per_s_per_gpu=100.0, tokens_per_s_per_user=80.0
)


def pool(role: str, layout: Layout, replicas: int) -> Pool:
    return Pool(
        role=role,  # type: ignore[arg-type]
        layout=layout,
        replicas=replicas,
        sequences=256,
        batched_tokens=8192,
        load=0.5,
    )


def test_an_option_counts_the_gpus_of_all_replicas_and_ranks() -> None:
    split = Option(
        mode="disaggregated",
        pools=(pool("prefill", Layout(tensor=4), 2), pool("decode", Layout(tensor=2, data=4, expert=8), 1)),
        predicted=PREDICTED,
    )
    assert split.gpus == 16
    assert split.label == "2 x TP4 prefill + 1 x TP2·DP4·EP8 decode"
    assert split.pool("aggregated") is None


def test_a_demand_scaled_keeps_its_hit_rate_and_never_asks_for_no_token() -> None:
    more = Demand(rate=10.0, lengths=((4000, 500), (2, 1)), hit_rate=0.5).scaled(rate=1.2, isl=0.1, osl=0.1)
    assert (more.rate, more.lengths, more.hit_rate) == (12.0, ((400, 50), (1, 1)), 0.5)
    assert (more.isl, more.osl) == (200.5, 25.5)


def test_a_profile_of_another_machine_is_told_apart_by_what_both_state() -> None:
    mine = Subject(model="m", backend="b", hardware="h200_sxm", layout=Layout(tensor=2))
    assert mine.differences(Subject(model="m", backend="b", backend_version="1.2")) == []
    assert mine.differences(Subject(model="m", backend="b", hardware="h100_sxm")) == [
        "hardware h200_sxm, not h100_sxm"
    ]
