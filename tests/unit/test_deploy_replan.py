"""A plan made anew for what runs: nothing that stays may move, nothing may be promised that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dynctl.deploy.beside import beside
from dynctl.deploy.digest import digest_of, reasons
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import initial_state
from dynctl.deploy.replan import as_before, compare, context_of, replan, with_stand_ins, without_stand_ins
from dynctl.deploy.reseat import reseat
from dynctl.deploy.room import Room, merged
from dynctl.deploy.seats import RunContext
from dynctl.errors import PlacementError, RecipeError
from dynctl.protocol.day2 import NodeRoom
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import Host, Inventory

RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: vllm
roles:
  prefill: {replicas: 1}
  decode: {replicas: 2, tensor_parallel: 2}
frontend: {port: 8000, replicas: 2, host: 0.0.0.0}
"""
RUN = RunContext("run1", "/runs/run1", "python")
TWO = Inventory((Host("n1", "10.0.0.1", 4), Host("n2", "10.0.0.2", 4)), "a file")


def load(tmp_path: Path, *sets: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)})


def planned(tmp_path: Path, *sets: str) -> Plan:
    return build_plan(load(tmp_path, *sets), TWO, (), RUN)


def in_use(plan: Plan) -> frozenset[tuple[str, int]]:
    return frozenset((node.name, port) for node in plan.nodes for port in node.ports)


def test_the_same_recipe_makes_the_same_plan_though_its_ports_are_in_use(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = replan(load(tmp_path), TWO, old, Room(in_use(old)))
    assert not compare(old, new)
    assert {p.id: (p.node, p.gpus, dict(p.ports)) for p in new.processes} == {
        p.id: (p.node, p.gpus, dict(p.ports)) for p in old.processes
    }
    assert context_of(old).run_dir == "/runs/run1"


def test_more_replicas_move_nobody_and_share_nothing(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = replan(load(tmp_path, "roles.decode.replicas=3"), TWO, old, Room(in_use(old)))
    found = compare(old, new)
    assert (found.added, found.removed, found.changed) == (("decode-2",), (), {})
    gpus = [(p.node, gpu) for p in new.processes if p.kind == "worker" for gpu in p.gpus]
    assert len(gpus) == len(set(gpus)) == 7
    ports = [(p.node, port) for p in new.processes if p.kind != "frontend" for port in p.ports.values()]
    assert len(ports) == len(set(ports))


def test_fewer_replicas_take_the_highest_and_start_no_frontend_anew(tmp_path: Path) -> None:
    old = planned(tmp_path)
    found = compare(old, replan(load(tmp_path, "roles.decode.replicas=1"), TWO, old, Room(in_use(old))))
    assert (found.added, found.removed, found.changed) == ((), ("decode-1",), {})


def test_one_role_takes_over_the_gpus_of_a_replica_of_another_that_leaves(tmp_path: Path) -> None:
    sets = ("roles.decode.tensor_parallel=1", "roles.decode.replicas=3")
    full = Inventory((Host("n1", "10.0.0.1", 4),), "a file")
    old = build_plan(load(tmp_path, *sets), full, (), RUN)
    flipped = (sets[0], "roles.decode.replicas=2", "roles.prefill.replicas=2")
    new = replan(load(tmp_path, *flipped), full, old, Room(in_use(old)))
    found = compare(old, new)
    assert (found.added, found.removed, found.changed) == (("prefill-1",), ("decode-2",), {})
    assert new.process("prefill-1").gpus == old.process("decode-2").gpus


def test_a_gpu_that_is_not_free_is_not_given_twice(tmp_path: Path) -> None:
    old = planned(tmp_path)
    with pytest.raises(PlacementError, match="needs 9 GPUs"):
        replan(load(tmp_path, "roles.decode.replicas=4"), TWO, old, Room(in_use(old)))


def test_a_stand_in_takes_what_is_free_and_there_is_none_where_nothing_is(tmp_path: Path) -> None:
    old, loaded = planned(tmp_path), load(tmp_path)
    wider = with_stand_ins(loaded, TWO, old, Room(in_use(old)), ["decode", "prefill"])
    extra = [p for p in wider.processes if p not in old.processes]
    assert {p.id for p in extra if p.kind == "worker"} == {"decode-2", "prefill-1"}
    assert wider.roles == old.roles
    full = Inventory((Host("n1", "10.0.0.1", 4), Host("n2", "10.0.0.2", 1)), "a file")
    tight = build_plan(loaded, full, (), RUN)
    assert with_stand_ins(loaded, full, tight, Room(in_use(tight)), ["decode", "prefill"]) == tight


def test_a_changed_argument_is_named_and_touches_only_its_role(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = replan(load(tmp_path, "roles.decode.args.max-model-len=4096"), TWO, old, Room(in_use(old)))
    changed = compare(old, new).changed or {}
    assert set(changed) == {"decode-0", "decode-1"}
    assert "+ --max-model-len 4096" in changed["decode-0"]


def test_a_changed_setting_of_the_router_is_named_and_touches_frontends_only(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = replan(load(tmp_path, "router.temperature=0.5"), TWO, old, Room(in_use(old)))
    assert compare(old, new).changed == {
        "frontend-0": ("router.temperature",),
        "frontend-1": ("router.temperature",),
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.served_name=other", "model.served_name changes from model to other"),
        ("roles.decode.tensor_parallel=1", "would have 1 GPUs instead of 2"),
        ("frontend.hosts=[n2]", "frontend-0 would move from n1 to n2"),
    ],
)
def test_what_cannot_change_while_it_serves_is_refused(tmp_path: Path, change: str, said: str) -> None:
    old = planned(tmp_path)
    with pytest.raises(RecipeError, match="while it serves") as refused:
        replan(load(tmp_path, change), TWO, old, Room(in_use(old)))
    assert said in refused.value.message
    assert refused.value.hint == "dynctl down, then up"


def test_how_many_replicas_there_are_is_no_reason_to_start_a_frontend_anew(tmp_path: Path) -> None:
    old = planned(tmp_path).process("frontend-0")
    new = planned(tmp_path, "roles.decode.replicas=1").process("frontend-0")
    assert old.command.files != new.command.files
    assert (digest_of(old), reasons(old, new)) == (digest_of(new), [])


def test_scaling_replaces_nobody_though_another_release_writes_commands_in_another_way(
    tmp_path: Path,
) -> None:
    old = planned(tmp_path, "router.temperature=0.5")
    new = as_before(old, replan(load(tmp_path, "roles.decode.replicas=3"), TWO, old, Room(in_use(old))))
    found = compare(old, new)
    assert (found.added, found.removed, found.changed) == (("decode-2",), (), {})
    assert new.roles == {"prefill": 1, "decode": 3}


def test_what_stood_in_is_no_part_of_the_next_plan(tmp_path: Path) -> None:
    old, loaded = planned(tmp_path), load(tmp_path)
    assert (
        without_stand_ins(with_stand_ins(loaded, TWO, old, Room(in_use(old)), ["decode", "prefill"])) == old
    )


def test_taking_a_plan_over_twice_is_taking_it_over_once(tmp_path: Path) -> None:
    old = planned(tmp_path)
    state = initial_state(old, 0.0)
    for seat in state.seats:
        seat.state, seat.incarnation, seat.built = "ready", 1, seat.digest
    new = replan(
        load(tmp_path, "roles.decode.replicas=1", "router.temperature=0.5"), TWO, old, Room(in_use(old))
    )
    wider = with_stand_ins(load(tmp_path), TWO, new, Room(in_use(old)), ["prefill"])
    for _ in range(2):
        reseat(state, wider)
        assert [(s.id, s.asked, s.surge, s.built == s.digest) for s in state.seats] == [
            ("frontend-0", "", False, False),
            ("frontend-1", "", False, False),
            ("prefill-0", "", False, True),
            ("decode-0", "", False, True),
            ("prefill-1", "", True, False),
            ("decode-1", "leave", True, True),
        ]
    assert state.roles == {"prefill": 1, "decode": 1}


def test_a_replica_that_was_to_leave_and_is_wanted_again_is_started_anew(tmp_path: Path) -> None:
    old = planned(tmp_path)
    state = initial_state(old, 0.0)
    fewer = replan(load(tmp_path, "roles.decode.replicas=1"), TWO, old, Room(in_use(old)))
    reseat(state, fewer)
    reseat(state, old)
    gone = state.seat("decode-1")
    assert gone is not None
    assert gone.asked == "restart"


def test_a_command_beside_a_worker_has_its_engines_environment_but_none_of_its_marks(tmp_path: Path) -> None:
    plan = planned(tmp_path, "engine.env.NCCL_DEBUG=INFO")
    launch = beside(plan, "decode-1", ["nvidia-smi", "-L"])
    assert (launch.node, launch.command.argv) == (plan.process("decode-1").node, ("nvidia-smi", "-L"))
    assert launch.command.env["NCCL_DEBUG"] == "INFO"
    assert launch.command.files == {}
    assert not {"DYNCTL_RUN", "DYNCTL_PROCESS"} & launch.command.env.keys()


LOST = {"n2": "it does not answer"}
THREE = replace(TWO, hosts=(*TWO.hosts, Host("n3", "10.0.0.3", 4)))


def by_ssh(tmp_path: Path, *sets: str) -> LoadedRecipe:
    return load(tmp_path, "target=ssh", *sets)


def test_nothing_new_is_planned_on_a_lost_node_and_what_is_there_stays(tmp_path: Path) -> None:
    old = build_plan(by_ssh(tmp_path), THREE, (), RUN)
    wanted = by_ssh(tmp_path, "roles.decode.replicas=4")
    by_itself = replan(wanted, THREE, old, Room(in_use(old)))
    new = replan(wanted, THREE, old, Room(in_use(old), lost=LOST))
    added = compare(old, new).added
    assert "n2" in {by_itself.process(seat).node for seat in added}, "else this shows nothing"
    assert "n2" not in {new.process(seat).node for seat in added}
    assert [new.process(p.id).node for p in old.processes] == [p.node for p in old.processes]
    assert {node.name for node in new.nodes} == {node.name for node in by_itself.nodes}


def test_with_all_its_hosts_lost_a_role_is_not_scaled_but_others_are(tmp_path: Path) -> None:
    old = build_plan(by_ssh(tmp_path, "roles.decode.hosts=[n2]"), THREE, (), RUN)
    room = Room(in_use(old), lost=LOST)
    with pytest.raises(PlacementError, match="no spare host is left that decode may run on"):
        replan(by_ssh(tmp_path, "roles.decode.hosts=[n2]", "roles.decode.replicas=3"), THREE, old, room)
    replan(by_ssh(tmp_path, "roles.decode.hosts=[n2]", "roles.prefill.replicas=2"), THREE, old, room)


def test_ports_and_gpus_that_others_have_on_any_node_are_left_to_them(tmp_path: Path) -> None:
    old = build_plan(by_ssh(tmp_path, "roles.decode.replicas=1"), TWO, (), RUN)
    wanted = by_ssh(tmp_path, "roles.decode.replicas=2")
    first = replan(wanted, TWO, old, Room(in_use(old))).process("decode-1")
    told = {first.node: NodeRoom(ports=sorted(first.ports.values()), gpus=dict.fromkeys(first.gpus, "other"))}
    second = replan(wanted, TWO, old, merged(Room(in_use(old)), told)).process("decode-1")
    assert first.node == second.node or not set(first.gpus) & set(second.gpus)
    assert (first.node, first.gpus) != (second.node, second.gpus)
    ports = {(first.node, port) for port in first.ports.values()}
    assert not ports & {(second.node, port) for port in second.ports.values()}
