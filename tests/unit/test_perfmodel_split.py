"""The choice of the split: what must hold whatever the machine, and what is said when nothing will do."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynctl.perfmodel.choice import Choice, Demand, Refused, Sla
from dynctl.perfmodel.layout import Layout
from dynctl.perfmodel.offers import Ask, Offers, fewest, highest
from dynctl.perfmodel.pools import Aggregated, Decode, Disaggregated
from dynctl.perfmodel.profile import DEFAULT, Limits, Profile
from dynctl.perfmodel.queueing import NO_WAIT
from dynctl.perfmodel.split import choose, keeps
from dynctl.perfmodel.traffic import traffic
from dynctl.profiler.phrases import demand_text
from tests.perf.split import SEATS, Seated, kept, limited, machine, mixed, seated, times_of

SMALL = 0.12
LAYOUTS = {Layout(tensor=size): machine(size) for size in (2, 4, 8)}
LONG = ((4000, 500),)


def ask(
    sla: Sla,
    demand: Demand,
    gpus: int = 16,
    layouts: dict[Layout, Profile] | None = None,
    *,
    most: bool = False,
) -> Ask:
    profiles = layouts or LAYOUTS
    return Ask(
        sla=sla,
        demand=demand,
        profiles={"prefill": profiles, "decode": profiles, "aggregated": profiles},
        gpus=gpus,
        most=most,
    )


def loose(rate: float = 4.0) -> Ask:
    return ask(Sla(ttft_s=1.0, itl_s=0.03), Demand(rate=rate, lengths=LONG))


def test_the_same_ask_gives_the_same_choice() -> None:
    assert choose(loose()) == choose(loose())
    assert choose(replace(loose(), most=True)) == choose(replace(loose(), most=True))


def test_the_best_of_each_mode_is_always_shown() -> None:
    for most in (False, True):
        found = choose(replace(loose(), most=most))
        assert {option.mode for option in found.options} == {"aggregated", "disaggregated"}
        assert found.chosen is found.options[0]


def test_fewer_gpus_are_never_passed_over_for_a_rate() -> None:
    found = choose(loose())
    assert found.chosen is not None
    assert found.chosen.gpus == min(option.gpus for option in found.options)
    assert all(option.predicted.capacity >= 4.0 for option in found.options)


def test_aggregated_wins_where_apart_is_no_better() -> None:
    found = choose(ask(Sla(ttft_s=0.3, itl_s=0.02), Demand(rate=1.0, lengths=LONG), most=True))
    assert found.chosen is not None
    assert found.chosen.mode == "aggregated"


def test_apart_wins_where_answers_must_not_be_held_up() -> None:
    found = choose(ask(Sla(ttft_s=1.0, itl_s=0.03), Demand(rate=1.0, lengths=LONG), most=True))
    assert found.chosen is not None
    assert found.chosen.mode == "disaggregated"


def test_equal_rates_go_to_fewer_gpus() -> None:
    """One reader of TP8 bounds both of these splits: decode on 4 GPUs is as good as on 8."""
    found = choose(ask(Sla(ttft_s=0.3, itl_s=0.02), Demand(rate=1.0, lengths=LONG), most=True))
    apart = [option for option in found.options if option.mode == "disaggregated"]
    assert apart
    assert apart[0].gpus < 16


def test_nodes_that_a_split_does_not_fit_are_not_planned_on() -> None:
    whole = choose(loose())
    assert whole.chosen is not None
    refused = tuple((pool.layout, pool.replicas) for pool in whole.chosen.pools)
    found = choose(replace(loose(), fits=lambda pools: pools != refused))
    assert found.chosen is not None
    assert found.chosen.label != whole.chosen.label


@pytest.mark.parametrize(
    ("sla", "words"),
    [
        (Sla(ttft_s=0.05, itl_s=0.03), ("TTFT of 50 ms cannot be kept", "TP8 is the fastest")),
        (Sla(ttft_s=1.0, itl_s=0.001), ("ITL of 1 ms cannot be kept", "TP8 is the fastest")),
        (Sla(ttft_s=0.05, itl_s=0.001), ("TTFT of 50 ms", "ITL of 1 ms")),
    ],
)
def test_an_impossible_sla_is_said_to_be_one_with_what_is_nearest(sla: Sla, words: tuple[str, ...]) -> None:
    found = choose(ask(sla, Demand(rate=1.0, lengths=LONG)))
    assert found.chosen is None
    assert all(word in found.why for word in words)
    assert found.options
    assert found.options[0].misses


def test_a_rate_that_the_gpus_do_not_serve_is_told_with_what_they_do_and_what_it_takes() -> None:
    found = choose(loose(rate=100.0))
    assert found.chosen is None
    assert "100 requests/s are more than 16 GPUs serve" in found.why
    most = float(found.why.split("at most ")[1].split(",")[0])
    needed = int(found.why.split("it would take ")[1].split(" ")[0])
    assert 7.0 < most < 12.0
    again = choose(replace(loose(rate=100.0), gpus=needed))
    assert again.chosen is not None
    assert again.chosen.gpus == needed


def test_no_layout_at_all_is_said_so() -> None:
    refused = (Refused(layout=Layout(tensor=3), reason="64 heads do not divide"),)
    found = choose(
        Ask(sla=Sla(ttft_s=1.0), demand=Demand(rate=1.0, lengths=LONG), profiles={}, gpus=8, refused=refused)
    )
    assert found.chosen is None
    assert "each is refused" in found.why
    assert found.refused == refused


def test_sensitivity_tells_whether_the_choice_still_holds() -> None:
    found = choose(replace(loose(), most=True))
    by = {(one.what, one.factor): one for one in found.sensitivity}
    assert len(by) == 6
    assert by["rate", 0.8].holds
    assert not by["rate", 1.2].holds
    assert by["isl", 0.8].holds


def test_what_is_chosen_keeps_the_sla_when_it_is_simulated() -> None:
    small = {Layout(): machine(1, SMALL)}
    wanted = ask(Sla(ttft_s=0.5, itl_s=0.015), Demand(rate=10.0, lengths=mixed(200, 2000, 100)), 8, small)
    found = choose(wanted)
    assert found.chosen is not None
    assert kept(found.chosen, small[Layout()], wanted, 5)


@pytest.mark.parametrize("case", SEATS[1:3], ids=lambda case: case[0])
def test_with_the_limit_that_is_written_nobody_waits_for_a_place(case: Seated) -> None:
    """With as many as the ITL allows the aggregated ones of these take 65 to 100 % longer."""
    for option, question, within in seated(case):
        predicted, seats = option.predicted, option.pools[-1].sequences
        assert seats > within
        ttft_s, itl_s = times_of(limited(option, seats), question, requests=5000)
        assert ttft_s <= 1.15 * predicted.ttft_s
        assert question.sla.itl_s is not None
        assert itl_s <= 1.05 * question.sla.itl_s


def test_where_the_kv_is_full_the_wait_for_a_place_is_in_the_first_token() -> None:
    mix = traffic(Demand(rate=1.0, lengths=((1000, 200),)))
    limits = Limits(kv_tokens=12_000, sequences=256, batched_tokens=8192)
    profile = msgspec.structs.replace(DEFAULT, limits=limits)
    found = Aggregated(profile, mix, 8192, None, "least_work").both(4.0, 1, 0.8)
    assert found is not None
    reading, talking = found
    assert 0.02 < talking.seat.delayed < 0.2
    assert reading.ttft_s(0.99) > replace(reading, seat=NO_WAIT).ttft_s(0.99) + 0.05


def test_with_no_rate_asked_and_nothing_found_no_rate_is_told() -> None:
    hopeless = ask(Sla(ttft_s=0.001, itl_s=0.001), Demand(rate=1.0, lengths=LONG), most=True)
    found = choose(hopeless)
    assert found.chosen is None
    assert demand_text(found.demand) == "requests at any rate of 4000 prompt and 500 answer tokens"
    assert demand_text(choose(replace(hopeless, most=False)).demand).startswith("1 requests/s of 4000")


def test_the_longest_request_must_fit_the_kv() -> None:
    mix = traffic(Demand(rate=1.0, lengths=((2_000_000, 10),)))
    assert Decode(machine(4), mix, None).seats == 0


def test_cached_prompts_are_read_faster() -> None:
    profile = machine(4)
    cold, warm = (traffic(Demand(rate=1.0, lengths=LONG, hit_rate=rate)) for rate in (0.0, 0.7))
    assert Disaggregated(profile, warm, 8192, "least_work").load(1.0, 1) < 0.5 * Disaggregated(
        profile, cold, 8192, "least_work"
    ).load(1.0, 1)


def test_a_link_that_is_full_bounds_the_rate() -> None:
    slow = machine(4)
    transfer = replace_transfer(slow, 1e8)
    offers = Offers(
        ask(Sla(itl_s=0.03), Demand(rate=1.0, lengths=LONG), layouts={Layout(tensor=4): transfer})
    )
    rate = offers.reading_rate(Layout(tensor=4), 2, 0.0)
    assert rate == pytest.approx(0.9 * 2 * 1e8 / (4000 * 327680), rel=0.01)


def replace_transfer(profile: Profile, bytes_per_s: float) -> Profile:
    transfer = msgspec.structs.replace(profile.transfer, bytes_per_s=bytes_per_s)
    return msgspec.structs.replace(profile, transfer=transfer)


def test_choosing_for_a_trace_of_thousands_takes_seconds_at_most() -> None:
    """No deadline is asserted; what is, is that the work does not grow with the trace."""
    few, many = (len(traffic(Demand(rate=1.0, lengths=mixed(n, 2000, 150))).prompts) for n in (500, 4000))
    assert few == many


@given(
    st.floats(0.1, 5.0),
    st.floats(0.008, 0.1),
    st.floats(0.2, 30.0),
    st.integers(100, 8000),
    st.integers(1, 600),
    st.integers(2, 24),
)
@settings(max_examples=25, deadline=None)
def test_never_more_gpus_than_there_are_and_never_a_miss(
    ttft_s: float, itl_s: float, rate: float, isl: int, osl: int, gpus: int
) -> None:
    wanted = ask(Sla(ttft_s=ttft_s, itl_s=itl_s), Demand(rate=rate, lengths=((isl, osl),)), gpus)
    found: Choice = choose(wanted)
    assert bool(found.chosen) != bool(found.why)
    for option in found.options if found.chosen else ():
        assert option.gpus <= gpus
        assert option.predicted.ttft_s <= ttft_s * 1.01
        assert option.predicted.itl_s <= itl_s * 1.001
        assert keeps(wanted, option)


def test_batches_of_both_roles_are_bounded_by_what_answers_may_take() -> None:
    mix = traffic(Demand(rate=1.0, lengths=LONG))
    alone = Decode(machine(8), mix, 0.02)
    shared = Aggregated(machine(8), mix, 8192, 0.02, "least_work").decode
    assert 0 < shared.seats < alone.seats
    assert alone.gap_s(alone.seats) <= 0.02 < alone.gap_s(alone.seats + 1)


def test_searches_find_the_edge() -> None:
    assert highest(lambda rate: rate <= 12.34, 1.0) == pytest.approx(12.34, rel=0.002)
    assert highest(lambda rate: rate <= 0.01234, 1.0) == pytest.approx(0.01234, rel=0.002)
    assert highest(lambda rate: False, 1.0) == 0.0
    assert [fewest(lambda n, least=least: n >= least, 8) for least in (1, 5, 8, 9)] == [1, 5, 8, 0]  # type: ignore[misc]
    assert fewest(lambda n: True, 0) == 0
