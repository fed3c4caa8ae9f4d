from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynctl.engines.base import Parallel, Rank
from dynctl.errors import PlacementError
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.placement import Need, place


def machines(*gpus: int) -> Inventory:
    return Inventory(tuple(Host(f"n{i}", f"10.0.0.{i}", g) for i, g in enumerate(gpus, 1)), "hosts.yaml")


def where(ranks: tuple[Rank, ...]) -> list[tuple[str, tuple[int, ...]]]:
    return [(rank.node, rank.gpus) for rank in ranks]


def test_replicas_are_packed() -> None:
    placed = place([Need("aggregated", 3, Parallel(tensor=4))], machines(8, 8))
    assert where(placed["aggregated", 0]) == [("n1", (0, 1, 2, 3))]
    assert where(placed["aggregated", 1]) == [("n1", (4, 5, 6, 7))]
    assert where(placed["aggregated", 2]) == [("n2", (0, 1, 2, 3))]


def test_the_large_go_first_so_that_all_fit() -> None:
    needs = [Need("prefill", 2, Parallel(tensor=2)), Need("decode", 1, Parallel(tensor=8))]
    placed = place(needs, machines(8, 4))
    assert where(placed["decode", 0]) == [("n1", tuple(range(8)))]
    assert where(placed["prefill", 1]) == [("n2", (2, 3))]


def test_a_small_replica_takes_the_fullest_node_it_fits() -> None:
    needs = [Need("decode", 1, Parallel(tensor=4)), Need("prefill", 1, Parallel(tensor=2))]
    placed = place(needs, machines(8, 2))
    assert where(placed["prefill", 0]) == [("n2", (0, 1))]


def test_tensor_parallel_crosses_nodes_only_when_larger_than_one() -> None:
    placed = place([Need("aggregated", 1, Parallel(tensor=16))], machines(8, 8))
    assert where(placed["aggregated", 0]) == [("n1", tuple(range(8))), ("n2", tuple(range(8)))]
    with pytest.raises(PlacementError, match="cannot be laid out"):
        place([Need("a", 1, Parallel(tensor=3)), Need("b", 1, Parallel(tensor=3))], machines(4, 2))


def test_pipeline_stages_stay_whole_on_nodes() -> None:
    placed = place([Need("aggregated", 1, Parallel(tensor=4, pipeline=3))], machines(6, 8, 4))
    assert where(placed["aggregated", 0]) == [
        ("n1", (0, 1, 2, 3)),
        ("n2", (0, 1, 2, 3)),
        ("n3", (0, 1, 2, 3)),
    ]


def test_one_node_engines_are_not_cut() -> None:
    need = Need("aggregated", 1, Parallel(tensor=8), multi_node=False)
    with pytest.raises(PlacementError):
        place([need], machines(4, 4))


def test_those_without_gpus_go_round() -> None:
    placed = place([Need("aggregated", 3, Parallel(tensor=4), gpus=False)], machines(0, 0))
    assert [where(placed["aggregated", i]) for i in range(3)] == [[("n1", ())], [("n2", ())], [("n1", ())]]


def test_more_gpus_than_there_are_names_need_and_have_and_nodes() -> None:
    with pytest.raises(PlacementError) as caught:
        place([Need("prefill", 2, Parallel(tensor=4)), Need("decode", 1, Parallel(tensor=8))], machines(8, 4))
    told = str(caught.value)
    assert "the recipe needs 16 GPUs, hosts.yaml has 12: no room for prefill-1 with 4" in told
    assert "n1 0 of 8 free, n2 0 of 4 free" in told
    assert caught.value.where == "roles.prefill"


SIZES = st.sampled_from([1, 2, 4, 8])


@given(
    st.lists(st.tuples(st.integers(1, 3), SIZES, SIZES), min_size=1, max_size=3),
    st.lists(st.integers(0, 8), min_size=1, max_size=4),
)
def test_no_gpu_is_given_twice_and_all_parts_are_equal(
    sizes: list[tuple[int, int, int]], gpus: list[int]
) -> None:
    needs = [Need(f"r{i}", n, Parallel(tensor=t, pipeline=p)) for i, (n, t, p) in enumerate(sizes)]
    inventory = machines(*gpus)
    try:
        placed = place(needs, inventory)
    except PlacementError:
        return
    assert placed == place(needs, inventory)
    taken = [(rank.node, gpu) for ranks in placed.values() for rank in ranks for gpu in rank.gpus]
    assert len(taken) == len(set(taken))
    have = {host.name: host.gpus for host in inventory.hosts}
    assert all(gpu < have[node] for node, gpu in taken)
    for need in needs:
        for index in range(need.replicas):
            ranks = placed[need.role, index]
            assert len({len(rank.gpus) for rank in ranks}) == 1
            assert sum(len(rank.gpus) for rank in ranks) == need.parallel.gpus
            assert len({rank.node for rank in ranks}) == len(ranks)


def test_roles_keep_to_the_hosts_they_are_given() -> None:
    needs = [
        Need("decode", 1, Parallel(tensor=8)),
        Need("prefill", 2, Parallel(tensor=4), hosts=("n1",)),
        Need("encode", 3, Parallel(), gpus=False, hosts=("n2", "n3")),
    ]
    placed = place(needs, machines(8, 8, 8))
    assert {rank.node for index in (0, 1) for rank in placed["prefill", index]} == {"n1"}
    assert where(placed["decode", 0]) == [("n2", tuple(range(8)))], (
        "it could have gone anywhere, and gave way"
    )
    assert [placed["encode", index][0].node for index in range(3)] == ["n2", "n3", "n2"]


def test_a_large_replica_is_cut_over_its_own_hosts_only() -> None:
    placed = place([Need("decode", 1, Parallel(tensor=8), hosts=("n1", "n3"))], machines(4, 4, 4))
    assert where(placed["decode", 0]) == [("n1", (0, 1, 2, 3)), ("n3", (0, 1, 2, 3))]
    with pytest.raises(PlacementError, match="no room on n1 for decode-0"):
        place([Need("decode", 1, Parallel(tensor=8), hosts=("n1",))], machines(4, 4, 4))


def test_hosts_whose_gpus_are_not_counted_yet_are_refused_with_the_remedy() -> None:
    inventory = Inventory((Host("n1", "n1", 8), Host("n2", "n2", discover=True)), "hosts.yaml")
    with pytest.raises(PlacementError, match="how many GPUs n2 of") as caught:
        place([Need("decode", 1, Parallel())], inventory)
    assert "write the number" in caught.value.hint
    place([Need("decode", 1, Parallel(), hosts=("n1",))], inventory)
    place([Need("decode", 2, Parallel(), gpus=False)], inventory)


@pytest.mark.parametrize("more", ["--inventory FILE with more hosts", "more slurm.nodes"])
def test_what_would_make_room_is_what_the_machines_come_from(more: str) -> None:
    there = replace(machines(1), more=more) if "slurm" in more else machines(1)
    with pytest.raises(PlacementError) as caught:
        place([Need("decode", 2, Parallel())], there)
    assert caught.value.hint == f"fewer replicas, smaller parallel sizes, or {more}"
