"""Which workers change their role with their engine running: none whose engine would be started otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dynctl.cli.amend import shown
from dynctl.deploy.handover import started_alike
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.records import initial_state
from dynctl.deploy.replan import as_before, compare, replan
from dynctl.deploy.reseat import reseat
from dynctl.deploy.room import Room
from dynctl.deploy.seats import RunContext
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.topology.inventory import Host, Inventory

RECIPE = """\
schema: dynctl/v1
name: demo
model: {path: org/model}
backend: vllm
engine: {kv_transfer: nixl_both}
roles:
  prefill: {replicas: 3}
  decode: {replicas: 2}
frontend: {port: 8000}
"""
RUN = RunContext("run1", "/runs/run1", "python")
FULL = Inventory((Host("n1", "10.0.0.1", 3), Host("n2", "10.0.0.2", 2)), "a file")
TO_DECODE = ("roles.prefill.replicas=2", "roles.decode.replicas=3")


def load(tmp_path: Path, *sets: str) -> LoadedRecipe:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE)
    return load_recipe(file, sets, environ={"HOME": str(tmp_path)})


def planned(tmp_path: Path, *sets: str, hosts: Inventory = FULL) -> Plan:
    return build_plan(load(tmp_path, *sets), hosts, (), RUN)


def after(tmp_path: Path, old: Plan, *sets: str, hosts: Inventory = FULL, lost: str = "") -> Plan:
    room = Room(frozenset((node.name, port) for node in old.nodes for port in node.ports))
    return replan(load(tmp_path, *sets), hosts, old, replace(room, lost={lost: "gone"}) if lost else room)


def taken(old: Plan, new: Plan) -> dict[str, str]:
    return dict(compare(old, new).taken)


@pytest.mark.parametrize(
    ("sets", "alike"),
    [
        ((), True),
        (("roles.prefill.hosts=[n1]",), True),
        (("engine.args.max-num-seqs=8", "roles.prefill.args.max-num-seqs=8"), True),
        (("roles.prefill.args.max-num-seqs=8",), False),
        (("roles.decode.env.A=1",), False),
        (("roles.prefill.tensor_parallel=2",), False),
        (("engine.kv_transfer=nixl",), False),
        (("roles.prefill.hosts=[n1, n2]", "roles.decode.hosts=[n2]"), True),
        (("roles.prefill.hosts=[n1]", "roles.decode.hosts=[n2]"), False),
        (("target=slurm",), True),
        (("target=slurm", "slurm.het=true"), False),
        (("target=slurm", "engine.container=an-image", "engine.runtime=pyxis"), False),
    ],
)
def test_the_recipe_tells_whether_workers_may_change_their_role(
    tmp_path: Path, sets: tuple[str, ...], alike: bool
) -> None:
    assert started_alike(load(tmp_path, *sets)) is alike


def test_one_that_comes_goes_on_with_the_engine_of_one_that_leaves(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = after(tmp_path, old, *TO_DECODE)
    assert taken(old, new) == {"decode-2": "prefill-2"}
    former, comes = old.process("prefill-2"), new.process("decode-2")
    assert (comes.node, comes.gpus, comes.ports) == (former.node, former.gpus, former.ports)
    was, now = old.process("prefill-2/engine"), new.process("decode-2/engine")
    assert (now.command.argv, now.ports) == (was.command.argv, was.ports)
    spec = json.loads(comes.command.files["specs/decode-2.json"])
    assert (spec["id"], spec["role"], spec["index"]) == ("decode-2", "decode", 2)
    assert spec["kv_endpoints"] == [f"ipc://sockets/{was.ports['http']}.kv"]
    assert shown(compare(old, new)) == ["prefill-2 becomes decode-2, its engine runs on"]


def test_it_goes_both_ways_and_for_as_many_as_both_leave_and_come(tmp_path: Path) -> None:
    old = planned(tmp_path)
    more = ("roles.prefill.replicas=4", "roles.decode.replicas=1")
    assert taken(old, after(tmp_path, old, *more)) == {"prefill-3": "decode-1"}
    two = ("roles.prefill.replicas=1", "roles.decode.replicas=4")
    assert taken(old, after(tmp_path, old, *two)) == {"decode-2": "prefill-2", "decode-3": "prefill-1"}
    roomy = Inventory((Host("n1", "10.0.0.1", 8),), "a file")
    old = planned(tmp_path, hosts=roomy)
    one_of_two = after(tmp_path, old, "roles.prefill.replicas=2", "roles.decode.replicas=4", hosts=roomy)
    assert taken(old, one_of_two) == {"decode-2": "prefill-2"}
    gpus = [(p.node, gpu) for p in one_of_two.processes if p.kind == "worker" for gpu in p.gpus]
    assert len(gpus) == len(set(gpus)) == 6
    ports = [(p.node, port) for p in one_of_two.processes for port in p.ports.values()]
    assert len(ports) == len(set(ports))


def test_and_back_again_as_the_one_it_was(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = after(tmp_path, old, *TO_DECODE)
    again = as_before(new, after(tmp_path, new))
    assert taken(new, again) == {"prefill-2": "decode-2"}
    assert again.process("prefill-2/engine").command == old.process("prefill-2/engine").command


@pytest.mark.parametrize(
    ("always", "why"),
    [
        (("engine.kv_transfer=nixl",), "engines that keep to one role"),
        (("roles.decode.args.max-num-seqs=9",), "other arguments"),
        (("roles.decode.env.SOME=thing",), "another environment"),
        (("roles.decode.tensor_parallel=2",), "other sizes"),
        (("roles.decode.hosts=[n2]", "roles.prefill.hosts=[n1]"), "another node"),
    ],
)
def test_others_start_an_engine_of_their_own(tmp_path: Path, always: tuple[str, ...], why: str) -> None:
    roomy = Inventory((Host("n1", "10.0.0.1", 8), Host("n2", "10.0.0.2", 8)), "a file")
    old = planned(tmp_path, *always, hosts=roomy)
    new = after(tmp_path, old, *always, *TO_DECODE, hosts=roomy)
    assert taken(old, new) == {}, why
    assert (compare(old, new).added, compare(old, new).removed) == (("decode-2",), ("prefill-2",))
    assert all(not process.takes for process in new.processes)


def test_arguments_that_change_with_the_roles_are_for_a_new_engine(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = after(tmp_path, old, *TO_DECODE, "engine.args.max-num-seqs=9")
    assert taken(old, new) == {}
    assert new.process("decode-2").gpus == old.process("prefill-2").gpus


def test_an_engine_over_two_nodes_is_not_handed_over(tmp_path: Path) -> None:
    wide = tuple(f"roles.{role}.tensor_parallel=4" for role in ("prefill", "decode"))
    hosts = Inventory(tuple(Host(f"n{i}", f"10.0.0.{i}", 2) for i in range(1, 11)), "a file")
    old = planned(tmp_path, *wide, hosts=hosts)
    new = after(tmp_path, old, *wide, *TO_DECODE, hosts=hosts)
    assert taken(old, new) == {}


def test_what_is_on_a_lost_node_is_not_handed_over(tmp_path: Path) -> None:
    roomy = Inventory((Host("n1", "10.0.0.1", 4), Host("n2", "10.0.0.2", 4)), "a file")
    old = planned(tmp_path, hosts=roomy)
    node = old.process("prefill-2").node
    new = after(tmp_path, old, *TO_DECODE, hosts=roomy, lost=node)
    assert taken(old, new) == {}
    assert new.process("decode-2").node != node


def test_it_is_in_the_plan_on_disk_and_in_the_seat_that_waits_for_it(tmp_path: Path) -> None:
    old = planned(tmp_path)
    new = Plan.from_json(after(tmp_path, old, *TO_DECODE).to_json())
    assert new.process("decode-2").takes == "prefill-2"
    assert '"takes"' not in old.to_json()
    state = initial_state(old, 0.0)
    reseat(state, new)
    seat, former = state.seat("decode-2"), state.seat("prefill-2")
    assert seat is not None
    assert former is not None
    assert (seat.takes, seat.state, former.asked) == ("prefill-2", "waiting", "leave")
    # A later change leaves it in the plan; whoever has it already does not wait for it again.
    later = as_before(new, after(tmp_path, new, *TO_DECODE))
    seat.takes = ""
    reseat(state, later)
    assert seat.takes == ""


@pytest.mark.parametrize(
    ("engine", "found"),
    [((), {"decode-2": "prefill-2"}), (("engine.container=an-image", "engine.runtime=pyxis"), {})],
    ids=["in-its-step", "a-step-of-its-own"],
)
def test_in_a_job_an_engine_goes_on_that_is_in_its_sidecars_step(
    tmp_path: Path, engine: tuple[str, ...], found: dict[str, str]
) -> None:
    """One that is a step of its own is called by the seat."""
    old = planned(tmp_path, "target=slurm", *engine)
    assert taken(old, after(tmp_path, old, "target=slurm", *engine, *TO_DECODE)) == found


def test_one_that_is_wanted_back_on_its_way_waits_for_what_it_may_have_become(tmp_path: Path) -> None:
    old = planned(tmp_path)
    state = initial_state(old, 0.0)
    new = after(tmp_path, old, *TO_DECODE)
    reseat(state, new)
    reseat(state, as_before(new, after(tmp_path, new)))
    seat, became = state.seat("prefill-2"), state.seat("decode-2")
    assert seat is not None
    assert became is not None
    assert (seat.asked, seat.takes, became.asked) == ("restart", "decode-2", "leave")
