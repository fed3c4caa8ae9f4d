"""What a change to a deployment that runs is made from: its recipe, plan and hosts, ports in use here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from dynctl.deploy.ask import ask_controller
from dynctl.deploy.digest import plan_digest
from dynctl.deploy.gpus import others
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.ports import listening
from dynctl.deploy.replan import as_before, replan, with_stand_ins, without_stand_ins
from dynctl.deploy.room import Room, merged
from dynctl.deploy.run import INVENTORY, Site, reserved_ports
from dynctl.deploy.slurm_grow import replan_or_grow, usable, with_awaited
from dynctl.deploy.slurm_size import on_its_parts
from dynctl.deploy.slurm_up import staged_recipe
from dynctl.errors import CodecError, LaunchError, UsageError
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.protocol.day2 import Actor, ApplyCall, Done, NodeRoom, RoomReply
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.topology.inventory import Host, Inventory

ANSWER_S = 10.0
FORMER = "recipe.lock.*.yaml"


@dataclass(frozen=True, slots=True)
class Amended:
    """A deployment that runs, and what it is to become in the `room` that there is on `hosts`.

    `loaded` is its recipe as it is placed there, `lock` as it is kept. `declined`: what is given up by that
    and why.
    """

    run: RunDir
    old: Plan
    new: Plan
    loaded: LoadedRecipe
    lock: str
    room: Room
    hosts: Inventory
    declined: str = ""


def read_plan(run: RunDir) -> Plan:
    """The plan of a run. Raises LaunchError, CodecError."""
    try:
        return Plan.from_json(run.plan.read_bytes())
    except OSError as error:
        raise LaunchError(f"it cannot be read: {error.strerror}", where=str(run.plan)) from error


def with_replicas(run: RunDir, roles: dict[str, int]) -> LoadedRecipe:
    """The run's recipe with other numbers of replicas. Raises RecipeError, and UsageError for a role that is
    not there or is needed.
    """
    there = read_plan(run).roles
    for role, count in roles.items():
        if role == "frontend":
            raise UsageError(
                "frontends are not scaled while they serve",
                hint="change frontend.replicas in the recipe, then dynctl up RECIPE",
            )
        if role not in there:
            raise UsageError(f"no role '{role}'", hint=f"there are: {', '.join(there)}")
        if count < 1:
            raise UsageError(f"{role}={count}: the model cannot be served without {role}")
    sets = [f"roles.{role}.replicas={count}" for role, count in roles.items()]
    loaded = load_recipe(run.lock, sets, environ={})
    check_recipe(loaded)
    return loaded


def former_recipe(run: RunDir) -> LoadedRecipe:
    """The recipe before this one. Raises UsageError when there is none."""
    found = sorted(run.path.glob(FORMER), key=lambda path: int(path.name.split(".")[2]))
    if not found:
        raise UsageError(
            "there is no former recipe", where=str(run.path), hint="nothing has been changed yet"
        )
    return load_recipe(found[-1], environ={})


def amend(run: RunDir, loaded: LoadedRecipe, site: Site, inventory: Inventory | None = None) -> Amended:
    """What the run becomes with this recipe. Raises PlacementError, PortInUse, RecipeError."""
    old = read_plan(run)
    room = room_of(run, old, site)
    lock = lock_text(loaded, site.version)
    if old.target == "slurm":
        loaded, hosts = in_its_job(run, loaded, old)
        names = {host.name for host in hosts.hosts}
        room = replace(room, lost={node: why for node, why in room.lost.items() if node in names})
        new = replan_or_grow(loaded, hosts, old, room, given_nodes(run))
        return Amended(run, old, new, loaded, lock, room, hosts)
    hosts = inventory or hosts_of(run, old)
    return Amended(run, old, replan(loaded, hosts, old, room), loaded, lock, room, hosts)


def in_its_job(run: RunDir, loaded: LoadedRecipe, plan: Plan) -> tuple[LoadedRecipe, Inventory]:
    """The recipe as it is placed on the nodes of its job and of follow-up jobs, and those nodes, without
    spare ones. Raises RecipeError, CodecError.
    """
    used = {node for process in plan.processes for node, _ in process.spots}
    hosts = usable(loaded, hosts_of(run, plan), given_nodes(run), used)
    return on_its_parts(staged_recipe(loaded)), hosts


def given_nodes(run: RunDir) -> list[str]:
    """The nodes that follow-up jobs have given. Raises CodecError."""
    return [node for one in load_follow_ups(run.path) for node in one.nodes]


def unchanged(run: RunDir, site: Site) -> Amended:
    """The run as it is. Raises RecipeError when something that its recipe names is no longer there."""
    plan = read_plan(run)
    try:
        lock = run.lock.read_text()
    except OSError as error:
        raise LaunchError(f"it cannot be read: {error.strerror}", where=str(run.lock)) from error
    loaded, hosts = load_recipe(run.lock, environ={}), hosts_of(run, plan)
    if plan.target == "slurm":
        loaded, hosts = in_its_job(run, loaded, plan)
    return Amended(run, plan, without_stand_ins(plan), loaded, lock, room_of(run, plan, site), hosts)


def rescaled(run: RunDir, roles: dict[str, int], site: Site) -> Amended:
    """What the run becomes with so many replicas, and nothing else. Raises as `amend` and `with_replicas`."""
    amended = amend(run, with_replicas(run, roles), site)
    return replace(amended, new=as_before(amended.old, amended.new))


def apply(amended: Amended, who: Actor, roles: Sequence[str], restart: Sequence[str] = ()) -> Done:
    """Have the controller do it, with one more replica of each of `roles` meanwhile where there is room.

    Raises TransportError, PlacementError when another deployment has just taken a GPU, and what the
    controller refuses it with.
    """
    run, old, hosts, room = amended.run, amended.old, amended.hosts, amended.room
    if old.target == "slurm":
        hosts, room = with_awaited(amended.loaded, hosts, amended.new, room)
    plan = with_stand_ins(amended.loaded, hosts, amended.new, room, roles)
    call = ApplyCall(
        actor=who,
        base=plan_digest(old),
        plan=plan.to_json(),
        lock=amended.lock,
        restart=list(restart),
        declined=amended.declined,
    )
    return ask_controller(run, old.registry, "controller.apply", call, Done, deadline_s=ANSWER_S)


def hosts_of(run: RunDir, plan: Plan) -> Inventory:
    """The hosts the run was planned on; those in use, with their GPUs in use, where it did not keep them."""
    try:
        return msgspec.json.decode(Path(run.path / INVENTORY).read_bytes(), type=Inventory)
    except FileNotFoundError:
        hosts = (Host(n.name, n.address, max(n.gpus, default=-1) + 1) for n in plan.nodes)
        return Inventory(tuple(hosts), "the plan")
    except OSError as error:
        raise LaunchError(f"it cannot be read: {error.strerror}", where=str(run.path / INVENTORY)) from error
    except msgspec.MsgspecError as error:
        raise CodecError(f"not an inventory: {error}", where=str(run.path / INVENTORY)) from error


def room_of(run: RunDir, plan: Plan, site: Site) -> Room:
    """What is not to be had, here and, as the controller tells, on the other nodes. Raises TransportError."""
    head = plan.process("controller").node
    ports = {(head, port) for port in (*listening(), *reserved_ports(site))}
    gpus = {(head, gpu) for gpu in others(site.home, run.run_id)} if plan.target != "slurm" else set()
    asked: dict[str, NodeRoom] = {}
    if plan.target != "local":
        told = ask_controller(run, plan.registry, "controller.room", None, RoomReply, deadline_s=ANSWER_S)
        asked = told.nodes
    return merged(Room(frozenset(ports), frozenset(gpus)), asked)
