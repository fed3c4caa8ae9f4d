"""More replicas than a job has room for: planned on nodes to come, moved when those are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynctl.controller.follow_ups import lost_groups
from dynctl.controller.moving import crippled
from dynctl.controller.rolling import Drop, changing, moves
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import initial_state
from dynctl.deploy.rehome import rehome, relocate
from dynctl.deploy.replan import compare
from dynctl.deploy.reseat import moved_seats, reseat
from dynctl.deploy.room import Room
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_grow import (
    awaited_groups,
    replan_or_grow,
    usable,
    with_awaited,
    without_awaiting,
)
from dynctl.deploy.slurm_size import on_its_parts, parts_of, widened
from dynctl.errors import PlacementError
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.topology.inventory import Host, Inventory, is_awaited

RUN = RunContext("run1", "/runs/run1", "python")
SETS = {"": (), "het": ("slurm.het={prefill: {mem: 1G}}", "slurm.mem=2G", "slurm.partition=gpu")}


def load(tmp_path: Path, *sets: str, kind: str = "") -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(
        "schema: dynctl/v1\nname: demo\ntarget: slurm\nbackend: vllm\nmodel: {path: org/model}\n"
        "roles:\n  prefill: {replicas: 1}\n  decode: {replicas: 1, tensor_parallel: 2}\n"
    )
    return on_its_parts(load_recipe(file, (*SETS[kind], *sets), environ={"HOME": str(tmp_path)}))


def nodes(*gpus: int, labels: tuple[str, ...] = ()) -> Inventory:
    made = (Host(f"n{i}", f"10.0.0.{i}", count, labels=labels[i - 1 : i]) for i, count in enumerate(gpus, 1))
    return Inventory(tuple(made), "job 7")


def places(plan: Plan) -> dict[str, str]:
    return {p.id: p.node for p in plan.processes if p.kind == "worker"}


def test_what_has_room_is_placed_and_only_the_rest_awaits_nodes(tmp_path: Path) -> None:
    there = nodes(4)
    old = build_plan(load(tmp_path), there, (), RUN)
    new = replan_or_grow(load(tmp_path, "roles.prefill.replicas=2"), there, old, Room())
    assert places(new)["prefill-1"] == "n1", "there is a free GPU"
    new = replan_or_grow(load(tmp_path, "roles.decode.replicas=4"), there, old, Room())
    assert {k: v for k, v in places(new).items() if k in places(old)} == places(old)
    waiting = {k: v for k, v in places(new).items() if k not in places(old)}
    assert waiting == {"decode-1": "node+1", "decode-2": "node+1", "decode-3": "node+2"}
    assert awaited_groups(new, [None]) == {0: [1, 1]}
    assert without_awaiting(new) == {"decode": 1}
    assert compare(old, new).added == ("decode-1", "decode-2", "decode-3")


def test_a_node_that_comes_takes_what_fits_on_it_and_the_rest_waits_on(tmp_path: Path) -> None:
    grown = load(tmp_path, "roles.decode.replicas=4")
    old = build_plan(load(tmp_path), nodes(4), (), RUN)
    plan = replan_or_grow(grown, nodes(4), old, Room())
    there = nodes(4, 4)
    for replica in (("decode", 1), ("decode", 2)):
        inventory, room = with_awaited(grown, there, plan, Room())
        plan = relocate(grown, inventory, plan, room, {replica})
    assert [places(plan)[f"decode-{i}"] for i in range(4)] == ["n1", "n2", "n2", "node+2"]
    inventory, room = with_awaited(grown, there, plan, Room())
    with pytest.raises(PlacementError):
        relocate(grown, inventory, plan, room, {("decode", 3)})
    assert awaited_groups(plan, [None]) == {0: [1]}


def test_scaling_again_keeps_what_awaits_and_scaling_back_drops_it(tmp_path: Path) -> None:
    there = nodes(4)
    first = build_plan(load(tmp_path), there, (), RUN)
    plan = replan_or_grow(load(tmp_path, "roles.decode.replicas=2"), there, first, Room())
    more = replan_or_grow(load(tmp_path, "roles.decode.replicas=4"), there, plan, Room())
    assert places(more)["decode-1"] == places(plan)["decode-1"] == "node+1"
    back = replan_or_grow(load(tmp_path), there, more, Room())
    assert not any(map(is_awaited, places(back).values()))
    assert not any(is_awaited(node.name) for node in back.nodes)


def test_parts_of_a_job_get_nodes_of_their_own(tmp_path: Path) -> None:
    there = nodes(1, 2, labels=("prefill", "decode"))
    old = build_plan(load(tmp_path, kind="het"), there, (), RUN)
    sets = ("roles.decode.replicas=2", "roles.prefill.replicas=2")
    new = replan_or_grow(load(tmp_path, *sets, kind="het"), there, old, Room())
    assert {places(new)["prefill-1"], places(new)["decode-1"]} == {"node+1", "node+2"}
    assert awaited_groups(new, ["prefill", "decode"]) == {0: [1], 1: [1]}
    inventory, _ = with_awaited(load(tmp_path, *sets, kind="het"), there, new, Room())
    shapes = {host.labels: host.gpus for host in inventory.hosts if is_awaited(host.name)}
    assert shapes == {("prefill",): 1, ("decode",): 2}


def test_nodes_of_a_replica_over_several_are_of_use_together(tmp_path: Path) -> None:
    sets = ("roles.decode.tensor_parallel=4",)
    there = nodes(2, 2, 2)
    old = build_plan(load(tmp_path, *sets), there, (), RUN)
    new = replan_or_grow(load(tmp_path, *sets, "roles.decode.replicas=3"), there, old, Room())
    assert awaited_groups(new, [None]) == {0: [2, 2]}


def test_without_follow_up_jobs_what_has_no_room_is_refused_as_ever(tmp_path: Path) -> None:
    there = nodes(4)
    old = build_plan(load(tmp_path), there, (), RUN)
    with pytest.raises(PlacementError, match="no room") as found:
        replan_or_grow(load(tmp_path, "roles.decode.replicas=2", "slurm.follow_up=false"), there, old, Room())
    assert "slurm.follow_up: true" in (found.value.hint or "")


def test_spare_nodes_are_not_grown_on_until_they_have_taken_over(tmp_path: Path) -> None:
    loaded, there = load(tmp_path, "slurm.spares=1"), nodes(4, 4, 4, 4)
    assert [host.name for host in usable(loaded, there, {"n4"}, {"n1"}).hosts] == ["n1", "n2", "n4"]
    assert [host.name for host in usable(loaded, there, {"n4"}, {"n1", "n3"}).hosts] == [
        *("n1", "n2", "n3", "n4")
    ]
    assert usable(load(tmp_path), there, (), ()).hosts == there.hosts


def test_seats_that_await_a_node_are_left_alone_until_they_have_one_or_leave(tmp_path: Path) -> None:
    there = nodes(4)
    old = build_plan(load(tmp_path), there, (), RUN)
    state = initial_state(old, 0.0)
    for seat in state.seats:
        seat.state, seat.pid, seat.incarnation, seat.built = "ready", 7, 1, seat.digest
    grown = load(tmp_path, "roles.decode.replicas=2")
    new = replan_or_grow(grown, there, old, Room())
    reseat(state, new)
    assert moves(state) == []
    assert changing(state) == "decode-1 awaits a node"
    inventory, room = with_awaited(grown, nodes(4, 4), new, Room())
    placed = relocate(grown, inventory, new, room, {("decode", 1)})
    given = initial_state(old, 0.0)
    given.seats[:] = [seat for seat in state.seats]
    reseat(given, placed)
    assert [(move.id, type(move).__name__) for move in moves(given)] == [("decode-1", "Open")]
    state.seats[-1].node = "node+1"
    reseat(state, replan_or_grow(load(tmp_path), there, new, Room()))
    assert moves(state) == [Drop("decode-1")]


def test_a_job_submitted_anew_asks_for_the_nodes_it_has_grown_to(tmp_path: Path) -> None:
    sets = ("slurm.nodes=1", "roles.decode.replicas=4")
    with pytest.raises(PlacementError):
        parts_of(load(tmp_path, *sets, "slurm.gpus_per_node=4"))
    (part,) = parts_of(widened(load(tmp_path, *sets), nodes(4)))
    assert (part.size.nodes, part.size.gpus) == (3, 4)
    (part,) = parts_of(widened(load(tmp_path), nodes(4)))
    assert (part.size.nodes, part.size.gpus) == (1, 4)
    het = widened(
        load(tmp_path, "roles.decode.replicas=2", kind="het"), nodes(1, 2, labels=("prefill", "decode"))
    )
    assert [(p.size.nodes, p.size.gpus) for p in parts_of(het)] == [(1, 1), (2, 2)]


def test_a_part_of_a_job_keeps_what_it_has_of_the_whole_when_it_is_read_again(tmp_path: Path) -> None:
    lock = tmp_path / "recipe.lock.yaml"
    lock.write_text(lock_text(load(tmp_path, kind="het"), "1"))
    again = load_recipe(lock, environ={})
    assert [(part.options.mem, part.options.partition) for part in parts_of(again)] == [
        ("1G", "gpu"),
        ("2G", "gpu"),
    ]


ONE_STEP = (
    "backend=trtllm",
    "roles.decode.tensor_parallel=4",
    "roles.prefill.tensor_parallel=2",
    "slurm.mpi=pmix",
)


def spots(plan: Plan, seat: str) -> list[str]:
    return [node for node, _ in plan.process(seat).spots]


def test_ranks_that_are_one_step_keep_all_their_nodes_and_get_more_of_one_job_alone(tmp_path: Path) -> None:
    there = nodes(2, 2, 2, 2)
    old = build_plan(load(tmp_path, *ONE_STEP), there, (), RUN)
    assert len(spots(old, "decode-0")) == 2
    one_free = next(
        host.name
        for host in there.hosts
        if host.name not in {*spots(old, "decode-0"), *spots(old, "prefill-0")}
    )
    grown = load(tmp_path, *ONE_STEP, "roles.decode.replicas=2")
    new = replan_or_grow(grown, there, old, Room(), given=[one_free])
    assert spots(new, "decode-0") == spots(old, "decode-0")
    assert spots(new, "decode-1") == ["node+1", "node+2"], "not one of a follow-up job beside one to be given"
    assert awaited_groups(new, [None]) == {0: [2]}
    assert {"decode-1", "decode-1/engine"} == {seat.id for seat in new.processes} - {
        p.id for p in old.processes
    }


def test_a_replica_leaves_with_all_its_nodes_when_one_with_ranks_alone_is_lost(tmp_path: Path) -> None:
    there = nodes(2, 2, 2, 2, 2)
    loaded = load(tmp_path, *ONE_STEP)
    old = build_plan(loaded, there, (), RUN)
    head, other = spots(old, "decode-0")
    state = initial_state(old, 0.0)
    seat = state.seat("decode-0")
    assert seat is not None
    seat.state = "ready"
    assert crippled(state, {other}, old) == frozenset()
    seat.state = "backoff"
    assert crippled(state, {other}, old) == {other}
    assert crippled(state, {head}, old) == frozenset(), "a worker of ours is there: it is stranded"
    assert lost_groups(old, {other}) == (set(), [("decode", 2)])
    assert lost_groups(old, set(spots(old, "prefill-0"))) == (set(spots(old, "prefill-0")), [])
    new = rehome(loaded, there, old, Room(), {other})
    assert other not in spots(new, "decode-0")
    assert moved_seats(old, new) == ["decode-0"]


def test_a_plan_without_such_ranks_is_stored_as_by_the_release_before(tmp_path: Path) -> None:
    """A controller of that release compares the bytes that a plan was made from."""
    plain, spread = (build_plan(load(tmp_path, *sets), nodes(2, 2, 2, 2), (), RUN) for sets in ((), ONE_STEP))
    assert '"also"' not in plain.to_json()
    assert [Plan.from_json(plan.to_json()) for plan in (plain, spread)] == [plain, spread]
