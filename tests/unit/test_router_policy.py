from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest

from dynctl.errors import RecipeError
from dynctl.kv.index import Index
from dynctl.protocol.instances import Instance, ModelCard, Role
from dynctl.protocol.kv_events import Stored
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.approximate import Recent
from dynctl.router.kv_aware import Knowledge
from dynctl.router.policy import policy
from dynctl.router.request import Candidate, Policy, RouteRequest
from dynctl.router.shared import SharedBlocks
from tests.workers import worker_instance

SIZE = 16


class Fleet:
    """Three workers of one role with one rank each, and a policy over them."""

    def __init__(self, mode: str, role: Role = "aggregated", **weights: Any) -> None:
        self.index, shared = Index(), SharedBlocks()
        self.role = role
        self.candidates = [
            Candidate((f"w-{number}", 0), _instance(f"w-{number}", role, number), RankLoad(shared))
            for number in range(3)
        ]
        spec = RouterSpec(mode=mode, **weights)
        known = Knowledge(self.index, shared, Recent(1000), lambda: 0.0)
        self.policy: Policy = policy(spec, known, Random(1))

    def pick(self, request: RouteRequest, among: list[int] | None = None) -> str:
        candidates = [self.candidates[number] for number in among or range(3)]
        picked = self.policy.pick(request, candidates, SIZE)
        self.policy.took(request, picked)
        return picked.candidate.instance.id

    def give(self, number: int, adapter: str) -> None:
        one = self.candidates[number]
        card = ModelCard(name="m", adapters=[adapter])
        instance = msgspec.structs.replace(one.instance, model=card)
        self.candidates[number] = replace(one, instance=instance)

    def load(self, number: int, footprint: Footprint) -> None:
        self.candidates[number].load.add(footprint)


def _instance(worker_id: str, role: Role, number: int) -> Instance:
    return worker_instance(number, id=worker_id, role=role)


def test_unknown_mode_names_the_valid_ones() -> None:
    with pytest.raises(RecipeError, match="kv, least_loaded, round_robin, random"):
        policy(RouterSpec(mode="best"), Knowledge(Index(), SharedBlocks(), Recent(1), lambda: 0.0), Random(1))


def test_round_robin_goes_around_each_role_by_itself() -> None:
    fleet = Fleet("round_robin")
    picks = [fleet.pick(RouteRequest("aggregated")) for _ in range(4)]
    assert picks == ["w-0", "w-1", "w-2", "w-0"]
    assert fleet.pick(RouteRequest("decode")) == "w-0"


def test_round_robin_goes_on_when_a_worker_is_missing() -> None:
    fleet = Fleet("round_robin")
    request = RouteRequest("aggregated")
    assert fleet.pick(request) == "w-0"
    assert fleet.pick(request, [0, 2]) == "w-2"
    assert fleet.pick(request, [0, 1]) == "w-0"


def test_least_loaded_counts_requests_of_all() -> None:
    fleet = Fleet("least_loaded")
    fleet.load(0, Footprint())
    fleet.candidates[1].load.requests = 5
    assert fleet.pick(RouteRequest("aggregated")) == "w-2"


@pytest.mark.parametrize(
    ("role", "footprint"),
    [
        ("aggregated", Footprint(40, (), 4)),
        ("prefill", Footprint(40, (), 0)),
        ("decode", Footprint(0, (), 4)),
    ],
)
def test_load_of_a_request_with_unknown_blocks(role: Role, footprint: Footprint) -> None:
    fleet = Fleet("least_loaded", role)
    picked = fleet.policy.pick(RouteRequest(role, None, 40, expected_output=20), fleet.candidates, SIZE)
    assert picked.footprint == footprint


def test_kv_goes_where_the_prompt_is_cached() -> None:
    fleet = Fleet("kv")
    hashes = [1, 2, 3, 4]
    fleet.index.apply(("w-1", 0), Stored(hashes[:3]))
    request = RouteRequest("aggregated", hashes, 4 * SIZE + 5)
    picked = fleet.policy.pick(request, fleet.candidates, SIZE)
    assert picked.candidate.instance.id == "w-1"
    assert picked.overlap == 3
    assert picked.footprint == Footprint(SIZE + 5, hashes, 1)


def test_kv_leaves_a_cached_worker_that_has_too_much_to_do() -> None:
    fleet = Fleet("kv")
    fleet.index.apply(("w-1", 0), Stored([1, 2, 3]))
    fleet.load(1, Footprint(30 * SIZE, (), 10))
    assert fleet.pick(RouteRequest("aggregated", [1, 2, 3, 4], 4 * SIZE)) != "w-1"


def test_kv_sends_siblings_of_a_running_prompt_to_the_same_worker() -> None:
    """Before any event tells of the prompt, its blocks in flight are the reason."""
    fleet = Fleet("kv", decode_request_weight=0.0)
    hashes = list(range(1, 9))
    fleet.load(2, Footprint(0, hashes))
    fleet.load(0, Footprint(0, (), 8))
    fleet.load(1, Footprint(0, (), 8))
    assert fleet.pick(RouteRequest("aggregated", hashes, 8 * SIZE)) == "w-2"


def test_kv_prefill_looks_at_the_prefill_side_only() -> None:
    fleet = Fleet("kv", "prefill")
    fleet.index.apply(("w-0", 0), Stored([1, 2]))
    fleet.load(0, Footprint(0, (), 500))
    picked = fleet.policy.pick(RouteRequest("prefill", [1, 2], 2 * SIZE), fleet.candidates, SIZE)
    assert picked.candidate.instance.id == "w-0"
    assert picked.footprint == Footprint(0, [1, 2], 0)


def test_kv_decode_ignores_what_is_cached() -> None:
    fleet = Fleet("kv", "decode")
    fleet.index.apply(("w-0", 0), Stored([1, 2]))
    fleet.load(0, Footprint(0, (), 1))
    fleet.load(1, Footprint(0, (), 1))
    picked = fleet.policy.pick(RouteRequest("decode", [1, 2], 2 * SIZE), fleet.candidates, SIZE)
    assert picked.candidate.instance.id == "w-2"
    assert (picked.overlap, picked.footprint) == (0, Footprint(0, (), 2))


@pytest.mark.parametrize("role", ["aggregated", "prefill", "decode"])
def test_kv_without_tokens_goes_by_load(role: Role) -> None:
    fleet = Fleet("kv", role)
    fleet.load(0, Footprint())
    fleet.load(2, Footprint())
    assert fleet.pick(RouteRequest(role)) == "w-1"


def test_kv_bars_the_crowded_holder_of_a_prompt() -> None:
    fleet = Fleet("kv")
    fleet.index.apply(("w-1", 0), Stored([1, 2, 3]))
    for _ in range(9):
        fleet.load(1, Footprint())
    request = RouteRequest("aggregated", [1, 2, 3], 3 * SIZE)
    assert fleet.pick(request) == "w-1"
    for _ in range(9):
        fleet.load(1, Footprint())
    assert fleet.pick(request) != "w-1"
    assert fleet.policy.weigh(request, fleet.candidates, SIZE).barred == [False, True, False]


def test_kv_gives_less_credit_for_slower_tiers() -> None:
    fleet = Fleet("kv", overlap_credit=1.0, prefill_load_scale=1.0)
    hashes = list(range(8))
    fleet.index.apply(("w-0", 0), Stored(hashes[:2], "G1"))
    fleet.index.apply(("w-0", 0), Stored(hashes[:6], "G2"))
    fleet.index.apply(("w-1", 0), Stored(hashes, "G3"))
    weighed = fleet.policy.weigh(RouteRequest("prefill", hashes, 8 * SIZE), fleet.candidates, SIZE)
    assert weighed.overlaps == [6, 8, 0]
    assert weighed.prices == [8 - 2 - 0.75 * 4, 8 - 0.25 * 8, 8]
    picked = fleet.policy.pick(RouteRequest("prefill", hashes, 8 * SIZE), fleet.candidates, SIZE)
    assert (picked.overlap, picked.best_overlap, picked.footprint.prefill_tokens) == (6, 8, 2 * SIZE)


def test_kv_prefers_workers_that_have_the_adapter_and_takes_another_when_they_are_busy() -> None:
    fleet = Fleet("kv")
    fleet.give(2, "lora")
    request = RouteRequest("aggregated", [1, 2], 2 * SIZE, adapter="lora")
    assert fleet.pick(request) == "w-2"
    fleet.load(2, Footprint(5000))
    assert fleet.pick(request) != "w-2"


@pytest.mark.parametrize("mode", ["kv", "least_loaded", "round_robin", "random", "power_of_two"])
def test_without_tokens_a_worker_with_the_adapter_is_taken(mode: str) -> None:
    fleet = Fleet(mode)
    fleet.give(1, "lora")
    assert {fleet.pick(RouteRequest("aggregated", adapter="lora")) for _ in range(9)} == {"w-1"}
    assert fleet.pick(RouteRequest("aggregated", adapter="nobody has it")) in ("w-0", "w-1", "w-2")


def test_decode_that_reads_the_prompt_counts_its_tokens() -> None:
    fleet = Fleet("kv", "decode")
    fleet.index.apply(("w-2", 0), Stored([1, 2]))
    request = RouteRequest("decode", [1, 2, 3], 3 * SIZE, reads_prompt=True)
    picked = fleet.policy.pick(request, fleet.candidates, SIZE)
    assert picked.candidate.instance.id == "w-2"
    assert picked.footprint == Footprint(SIZE, [1, 2, 3], 0)


def test_used_blocks_are_the_last_to_be_forgotten() -> None:
    fleet = Fleet("kv")
    fleet.index._limit = 16
    fleet.index.apply(("w-0", 0), Stored(list(range(16))))
    assert fleet.pick(RouteRequest("aggregated", [0, 1, 99], 3 * SIZE)) == "w-0"
    fleet.index.apply(("w-0", 0), Stored([100, 101, 102]))
    assert fleet.index.match([0, 1]) == {("w-0", 0): 2}
    assert fleet.index.match([2]) == {}


def test_random_takes_all_in_time() -> None:
    fleet = Fleet("random")
    assert {fleet.pick(RouteRequest("aggregated")) for _ in range(50)} == {"w-0", "w-1", "w-2"}


def test_power_of_two_never_takes_the_busiest() -> None:
    fleet = Fleet("power_of_two")
    fleet.load(1, Footprint())
    assert {fleet.pick(RouteRequest("aggregated")) for _ in range(50)} == {"w-0", "w-2"}
    assert fleet.pick(RouteRequest("aggregated"), [1]) == "w-1"


def test_consistent_hash_keeps_each_key_at_its_worker() -> None:
    fleet = Fleet("consistent_hash")
    sessions = [RouteRequest("aggregated", session=f"s-{number}") for number in range(60)]
    before = [fleet.pick(request) for request in sessions]
    assert set(before) == {"w-0", "w-1", "w-2"}
    assert [fleet.pick(request) for request in sessions] == before
    without = [fleet.pick(request, [0, 1]) for request in sessions]
    assert all(new == old for new, old in zip(without, before, strict=True) if old != "w-2")
    prompts = {fleet.pick(RouteRequest("aggregated", [7, number], 32)) for number in range(20)}
    assert len(prompts) == 1


def test_consistent_hash_leaves_a_crowded_worker_and_goes_by_load_without_a_key() -> None:
    fleet = Fleet("consistent_hash")
    request = RouteRequest("aggregated", session="s")
    home = int(fleet.pick(request).removeprefix("w-"))
    for _ in range(40):
        fleet.load(home, Footprint())
    assert fleet.pick(request) != f"w-{home}"
    fleet.load((home + 1) % 3, Footprint())
    assert fleet.pick(RouteRequest("aggregated")) == f"w-{(home + 2) % 3}"


def test_modes_by_load_are_weighed_by_requests() -> None:
    fleet = Fleet("random")
    fleet.load(1, Footprint())
    weighed = fleet.policy.weigh(RouteRequest("aggregated"), fleet.candidates, SIZE)
    assert (weighed.prices, weighed.overlaps, weighed.barred) == ([0, 1, 0], [0, 0, 0], None)


def test_prompt_known_by_its_length_alone_goes_where_the_least_is_to_compute() -> None:
    fleet = Fleet("kv", "prefill")
    fleet.load(0, Footprint(50_000))
    for _ in range(3):
        fleet.load(1, Footprint(100))
    fleet.load(2, Footprint(20_000))
    picked = fleet.policy.pick(RouteRequest("prefill", None, 4000), fleet.candidates, SIZE)
    assert (picked.candidate.instance.id, picked.footprint) == ("w-1", Footprint(4000))
