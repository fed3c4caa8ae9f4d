"""GPUs are claimed before a plan is taken over, and given up once nothing uses them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from pathlib import Path

import pytest

from dynctl.controller import claims
from dynctl.controller.claims import Claims
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import initial_state
from dynctl.deploy.reseat import reseat
from dynctl.deploy.seats import RunContext
from dynctl.errors import LaunchError, PlacementError
from dynctl.recipe.load import load_recipe
from dynctl.topology.inventory import Host, Inventory

RUN = RunContext("run1", "/runs/run1", "python")
TWO = Inventory((Host("n1", "10.0.0.1", 2), Host("n2", "10.0.0.2", 2)), "a file")
RECIPE = "schema: dynctl/v1\nname: demo\ntarget: ssh\nbackend: vllm\nmodel: {path: org/model}\n"


class Nodes:
    """Nodes that hold what they are told to; `others` is what somebody else has there."""

    def __init__(self, *others: tuple[str, int]) -> None:
        self.others = set(others)
        self.held: dict[str, set[int]] = {}
        self.silent: set[str] = set()

    async def hold(self, node: str, gpus: Collection[int]) -> None:
        await asyncio.sleep(0)
        if node in self.silent:
            raise LaunchError("no answer", where=node)
        if any((node, gpu) in self.others for gpu in gpus):
            raise PlacementError("'other' has GPU 0 already", where=node)
        self.held[node] = set(gpus)


def plan_of(tmp_path: Path, replicas: int) -> Plan:
    file = tmp_path / "r.yaml"
    file.write_text(f"{RECIPE}roles: {{decode: {{replicas: {replicas}}}, prefill: {{replicas: 1}}}}\n")
    return build_plan(load_recipe(file, environ={"HOME": str(tmp_path)}), TWO, (), RUN)


async def settled(made: Claims, plan: Plan, busy: Collection[str] = ()) -> None:
    for _ in range(20):
        made.see_to(plan, busy)
        await asyncio.sleep(0)


async def test_a_gpu_of_another_deployment_refuses_the_change_and_nothing_more_is_claimed(
    tmp_path: Path,
) -> None:
    old, new = plan_of(tmp_path, 1), plan_of(tmp_path, 3)
    nodes = Nodes(("n2", 0))
    made = Claims(nodes, initial_state(old, 0.0))  # type: ignore[arg-type]
    await settled(made, old)
    before = {node: set(gpus) for node, gpus in nodes.held.items()}
    with pytest.raises(PlacementError, match="'other' has GPU 0"):
        async with made.growing(old, new):
            pytest.fail("it was not to be taken over")
    await settled(made, old)
    assert nodes.held == before
    nodes.others.clear()
    async with made.growing(old, new):
        assert nodes.held == {"n1": {0, 1}, "n2": {0, 1}}


async def test_what_leaves_keeps_its_gpus_until_it_has_left(tmp_path: Path) -> None:
    old, new = plan_of(tmp_path, 3), plan_of(tmp_path, 1)
    nodes, state = Nodes(), initial_state(old, 0.0)
    made = Claims(nodes, state)  # type: ignore[arg-type]
    reseat(state, new)
    await settled(made, new)
    assert nodes.held == {"n1": {0, 1}, "n2": {0, 1}}
    state.seats[:] = [seat for seat in state.seats if seat.asked != "leave"]
    await settled(made, new)
    assert sum(map(len, nodes.held.values())) == 2


async def test_a_node_where_something_is_being_ended_or_that_is_away_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "AGAIN_S", 0.0)
    plan, nodes = plan_of(tmp_path, 3), Nodes()
    made = Claims(nodes, initial_state(plan, 0.0))  # type: ignore[arg-type]
    await settled(made, plan, busy={"n2"})
    assert set(nodes.held) == {"n1"}
    nodes.silent.add("n2")
    await settled(made, plan)
    assert set(nodes.held) == {"n1"}
    nodes.silent.clear()
    await settled(made, plan)
    assert nodes.held == {"n1": {0, 1}, "n2": {0, 1}}
