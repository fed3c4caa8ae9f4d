from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from dynctl.protocol.instances import Role
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.cost import Demand, Standings, costs, pick
from dynctl.router.shared import SharedBlocks

SIZE = 16
PLAIN = RouterSpec(overlap_credit=1.0, prefill_load_scale=1.0)


def loaded(prefill_tokens: int = 0, blocks: int = 0, others_waiting: int = 0) -> RankLoad:
    load = RankLoad(SharedBlocks())
    load.add(Footprint(prefill_tokens, (), blocks))
    load.others_waiting = others_waiting
    return load


def price(
    load: RankLoad,
    *,
    role: Role = "aggregated",
    overlap: float = 0,
    shared: int = 0,
    spec: RouterSpec = PLAIN,
) -> float:
    demand = Demand(10 * SIZE, 10, SIZE, role != "decode", role != "prefill")
    return costs(spec, demand, Standings([load], [overlap], [shared]))[0]


def test_cost_is_prefill_left_to_do_plus_blocks_in_use() -> None:
    load = loaded(prefill_tokens=4 * SIZE, blocks=7)
    assert price(load, overlap=3) == (4 + 10 - 3) + (7 + 10)


def test_published_example_chooses_the_second_worker() -> None:
    """Blocks cached 2 / 5 / 8, blocks in use 10 / 5 / 9, a prompt of 10 blocks: 18 / 10 / 11."""
    workers = [(loaded(0, 10), 2), (loaded(0, 5), 5), (loaded(0, 9), 8)]
    prices = [price(load, overlap=overlap) - 10 for load, overlap in workers]
    assert prices == [18, 10, 11]


def test_prefill_role_costs_prefill_only_and_decode_role_blocks_only() -> None:
    load = loaded(prefill_tokens=4 * SIZE, blocks=7)
    assert price(load, role="prefill", overlap=3) == 4 + 10 - 3
    assert price(load, role="decode") == 7 + 10


def test_credit_above_one_still_tells_a_queue_from_none() -> None:
    spec = RouterSpec(overlap_credit=5.0, prefill_load_scale=1.0)
    assert price(loaded(), role="prefill", overlap=10, spec=spec) == 10 - 50
    assert price(loaded(4 * SIZE), role="prefill", overlap=10, spec=spec) == 14 - 50


def test_credit_decays_with_load_beyond_the_least_loaded() -> None:
    spec = RouterSpec(overlap_credit=1.0, prefill_load_scale=1.0, overlap_decay=1.0)
    demand = Demand(10 * SIZE, 10, SIZE, True, False)
    busy, idle = loaded(prefill_tokens=10 * SIZE), loaded()
    assert costs(spec, demand, Standings([busy, idle], [8, 8], [0, 0])) == [20 - 8 / 2, 10 - 8]


def test_loading_an_adapter_costs_its_tokens() -> None:
    demand = Demand(10 * SIZE, 10, SIZE, True, False)
    workers = Standings([loaded(), loaded()], [0, 0], [0, 0], [3 * SIZE, 0])
    assert costs(PLAIN, demand, workers) == [13, 10]


def test_weights_scale_their_parts() -> None:
    load = loaded(prefill_tokens=2 * SIZE, blocks=3)
    spec = RouterSpec(overlap_credit=0.5, prefill_load_scale=2.0, decode_request_weight=100.0)
    assert price(load, overlap=4, spec=spec) == 2.0 * (2 + 10 - 2) + 13 + 100


def test_blocks_in_use_already_are_not_needed_again() -> None:
    assert price(loaded(blocks=7), shared=4) == price(loaded(blocks=7)) - 4


def test_waiting_requests_of_others_count_as_long_as_this_one() -> None:
    assert price(loaded(others_waiting=2), role="prefill") == 30


def test_lowest_wins_and_ties_are_broken_at_random() -> None:
    rng = Random(1)
    assert pick([3.0, 1.0, 2.0], 0.0, rng) == 1
    assert {pick([1.0, 2.0, 1.0], 0.0, rng) for _ in range(50)} == {0, 2}


def test_same_randomness_same_choice() -> None:
    prices = [1.0] * 8
    assert [pick(prices, 0.0, Random(5)) for _ in range(3)] == [pick(prices, 0.0, Random(5))] * 3


def test_temperature_draws_by_scaled_cost() -> None:
    rng = Random(2)
    counts = Counter(pick([100.0, 150.0, 200.0], 0.5, rng) for _ in range(20_000))
    weights = [1.0, 0.3679, 0.1353]
    for index, weight in enumerate(weights):
        assert counts[index] / 20_000 == pytest.approx(weight / sum(weights), abs=0.02)


def test_temperature_with_equal_costs_is_fair() -> None:
    rng = Random(3)
    assert {pick([4.0, 4.0], 1.0, rng) for _ in range(50)} == {0, 1}
