from __future__ import annotations

from random import Random

import pytest

from dynctl.errors import RecipeError
from dynctl.kv.index import Index
from dynctl.protocol.instances import Instance, Role
from dynctl.protocol.kv_events import Stored
from dynctl.protocol.specs import RouterSpec
from dynctl.router.active import Footprint, RankLoad
from dynctl.router.policy import Candidate, Policy, RouteRequest, policy
from dynctl.router.shared import SharedBlocks

SIZE = 16


class Fleet:
    """Three workers of one role with one rank each, and a policy over them."""

    def __init__(self, mode: str, role: Role = "aggregated", **weights: float) -> None:
        self.index, shared = Index(), SharedBlocks()
        self.role = role
        self.candidates = [
            Candidate((f"w-{number}", 0), _instance(f"w-{number}", role, number), RankLoad(shared))
            for number in range(3)
        ]
        spec = RouterSpec(mode=mode, **weights)
        self.policy: Policy = policy(spec, self.index, shared, Random(1))

    def pick(self, request: RouteRequest, among: list[int] | None = None) -> str:
        candidates = [self.candidates[number] for number in among or range(3)]
        return self.policy.pick(request, candidates, SIZE).candidate.instance.id

    def load(self, number: int, footprint: Footprint) -> None:
        self.candidates[number].load.add(footprint)


def _instance(worker_id: str, role: Role, number: int) -> Instance:
    return Instance(
        id=worker_id,
        incarnation=1,
        role=role,
        index=number,
        node="n",
        pid=1,
        started_at=0.0,
        url="http://h:1",
    )


def test_unknown_mode_names_the_valid_ones() -> None:
    with pytest.raises(RecipeError, match="round_robin, least_loaded, kv"):
        policy(RouterSpec(mode="random"), Index(), SharedBlocks(), Random(1))


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
    fleet.load(1, Footprint(10 * SIZE, (), 10))
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
    assert picked.footprint == Footprint(0)


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
