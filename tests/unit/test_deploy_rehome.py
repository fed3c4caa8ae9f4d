"""Where the workers of a lost node go: somewhere with room, and nobody else moves."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.deploy.plan import Plan, PlannedProcess
from dynctl.deploy.planner import build_plan
from dynctl.deploy.rehome import rehome
from dynctl.deploy.reseat import moved_seats
from dynctl.deploy.room import Room
from dynctl.deploy.seats import RunContext
from dynctl.errors import PlacementError
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import Host, Inventory

RUN = RunContext("run1", "/runs/run1", "python")
RECIPES = {
    "gpus": "backend: vllm\nmodel: {path: org/model}\nroles:\n  decode: {replicas: 3, tensor_parallel: 2}\n"
    "  prefill: {replicas: 1}\n",
    "mocker": "backend: mocker\nmodel: {path: 'builtin:tiny'}\nroles:\n  aggregated: {replicas: 3}\n",
}


def load(tmp_path: Path, kind: str, *sets: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    head = "schema: dynctl/v1\nname: demo\ntarget: ssh\nfrontend: {port: 8000, host: 0.0.0.0}\n"
    file.write_text(head + RECIPES[kind])
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)})


def hosts(*gpus: int) -> Inventory:
    made = (Host(f"n{i}", f"10.0.0.{i}", count) for i, count in enumerate(gpus, 1))
    return Inventory(tuple(made), "a file")


def workers(plan: Plan) -> dict[str, PlannedProcess]:
    return {p.id: p for p in plan.processes if p.kind == "worker"}


def test_gpu_workers_go_to_free_gpus_and_nobody_else_moves(tmp_path: Path) -> None:
    loaded, inventory = load(tmp_path, "gpus"), hosts(4, 3, 4)
    old = build_plan(loaded, inventory, (), RUN)
    lost = workers(old)["decode-2"].node
    new = rehome(loaded, inventory, old, Room(), {lost})
    moved = moved_seats(old, new)
    assert moved == [p.id for p in workers(old).values() if p.node == lost]
    assert all(workers(new)[seat].node != lost for seat in moved)
    stay = [p for p in old.processes if p.id.partition("/")[0] not in moved]
    assert all(p in new.processes for p in stay)
    places = [(p.node, gpu) for p in workers(new).values() for gpu in p.gpus]
    assert len(places) == len(set(places)) == 7


def test_ports_of_the_next_node_are_its_own(tmp_path: Path) -> None:
    loaded, inventory = load(tmp_path, "gpus"), hosts(4, 3, 4)
    old = build_plan(loaded, inventory, (), RUN)
    new = rehome(loaded, inventory, old, Room(), {workers(old)["decode-2"].node})
    for name in ("n1", "n2", "n3"):
        ports = [port for p in new.processes if p.node == name for port in p.ports.values()]
        assert len(ports) == len(set(ports))


def test_without_free_gpus_they_stay_away(tmp_path: Path) -> None:
    loaded, inventory = load(tmp_path, "gpus"), hosts(4, 3)
    old = build_plan(loaded, inventory, (), RUN)
    with pytest.raises(PlacementError):
        rehome(loaded, inventory, old, Room(), {"n2"})


def test_workers_without_gpus_go_to_a_spare_node_and_to_no_other(tmp_path: Path) -> None:
    loaded = load(tmp_path, "mocker")
    four = build_plan(loaded, hosts(0, 0, 0, 0), (), RUN)
    assert [p.node for p in workers(four).values()] == ["n1", "n2", "n3"]
    new = rehome(loaded, hosts(0, 0, 0, 0), four, Room(), {"n2"})
    assert moved_seats(four, new) == ["aggregated-1"]
    assert workers(new)["aggregated-1"].node == "n4"
    three = build_plan(loaded, hosts(0, 0, 0), (), RUN)
    with pytest.raises(PlacementError, match="no spare host is left"):
        rehome(loaded, hosts(0, 0, 0), three, Room(), {"n2"})


def test_a_role_keeps_to_its_hosts(tmp_path: Path) -> None:
    loaded = load(tmp_path, "mocker", "roles.aggregated.hosts=[n1, n2, n3]")
    plan = build_plan(loaded, hosts(0, 0, 0, 0), (), RUN)
    with pytest.raises(PlacementError):
        rehome(loaded, hosts(0, 0, 0, 0), plan, Room(), {"n2"})


def test_a_moved_worker_takes_no_port_that_is_busy_on_its_next_node(tmp_path: Path) -> None:
    loaded, inventory = load(tmp_path, "mocker"), hosts(0, 0, 0, 0)
    old = build_plan(loaded, inventory, (), RUN)

    def ports(plan: Plan) -> set[int]:
        return {port for p in plan.processes if p.id.startswith("aggregated-1") for port in p.ports.values()}

    first = ports(rehome(loaded, inventory, old, Room(), {"n2"}))
    busy = frozenset(("n4", port) for port in first)
    assert not first & ports(rehome(loaded, inventory, old, Room(busy), {"n2"}))


def test_nobody_is_moved_to_gpus_of_another_deployment_or_to_another_lost_node(tmp_path: Path) -> None:
    loaded, inventory = load(tmp_path, "gpus"), hosts(4, 3, 4)
    old = build_plan(loaded, inventory, (), RUN)
    lost = workers(old)["decode-2"].node
    moved = moved_seats(old, rehome(loaded, inventory, old, Room(), {lost}))
    free = [
        (p.node, gpu)
        for p in workers(rehome(loaded, inventory, old, Room(), {lost})).values()
        if p.id in moved
        for gpu in p.gpus
    ]
    with pytest.raises(PlacementError):
        rehome(loaded, inventory, old, Room(gpus=frozenset(free)), {lost})
    with pytest.raises(PlacementError):
        rehome(loaded, inventory, old, Room(lost={free[0][0]: "no answer"}), {lost})
