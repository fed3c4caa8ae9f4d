"""A deployment on other machines: plan on what they are, hand them their files, start agents and controller.

The controller runs on the head, the first host of the inventory; the machine `up` was called on may go away.
What is kept here is where the run is (`Remote`), so that other verbs find the head and `down` every host.
"""

from __future__ import annotations

import asyncio
import ipaddress
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from dynctl.deploy.gpus import SHARE_HINT
from dynctl.deploy.plan import Plan, PlannedProcess
from dynctl.deploy.planner import build_plan
from dynctl.deploy.receive import Answer, Claim, Join, Look, Spawn
from dynctl.deploy.remote_hosts import ANSWER_S, HostSite, raise_first, sweep
from dynctl.deploy.remote_note import Remote, RemoteHost
from dynctl.deploy.run import Checked, run_files
from dynctl.deploy.seats import ENGINE_KEY_FILE, KEYS_FILE, NodeContext, RunContext
from dynctl.deploy.stop import CONTROLLER
from dynctl.errors import (
    DynctlError,
    LaunchError,
    PlacementError,
)
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.ports import first_port_of
from dynctl.transport.keys import Keys, save_engine_key


def contexts(sites: Iterable[HostSite], run_id: str) -> RunContext:
    """Directories and interpreters of a run on its hosts, the first of which is the head."""
    there = list(sites)
    head = f"{there[0].home}/runs/{run_id}"
    nodes = {site.name: NodeContext(f"{site.home}/nodes/{run_id}/{site.name}", site.python) for site in there}
    nodes[there[0].name] = NodeContext(head, there[0].python)
    return RunContext(run_id, head, there[0].python, first_port_of(run_id), nodes)


def with_addresses(inventory: Inventory, found: Mapping[str, str]) -> Inventory:
    """The inventory with addresses that can be listened on: found ones where it has none, or a name.

    Raises LaunchError for one that the other hosts cannot reach.
    """

    def of(host: Host) -> Host:
        if is_ip(host.address):
            return host
        address = found.get(host.name, host.address)
        if len(inventory.hosts) > 1 and is_ip(address) and ipaddress.ip_address(address).is_loopback:
            raise LaunchError(
                f"the other hosts cannot reach it at {address}, where ssh has reached it",
                where=host.name,
                hint="write its `address` in the inventory, as the other hosts see it",
            )
        return replace(host, address=address)

    return replace(inventory, hosts=tuple(map(of, inventory.hosts)))


def is_ip(text: str) -> bool:
    """Whether it is an address that can be listened on as it stands."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is to be made: its id, its recipe resolved, whether it may have GPUs that others use.

    `missing`: why hosts of the inventory cannot be reached, which only what lives already can do without.
    """

    run_id: str
    lock: str
    share_gpus: bool = False
    missing: tuple[DynctlError, ...] = ()


@dataclass(frozen=True, slots=True)
class Started:
    """A deployment whose controller has been started on its head. `adopted`: processes of it lived already,
    `running`: its controller too.
    """

    plan: Plan
    remote: Remote
    adopted: bool
    running: bool
    inventory: Inventory
    secrets: Mapping[str, str] = field(repr=False)


async def start(
    checked: Checked, wanted: Wanted, sites: Sequence[HostSite], note: Callable[[Remote, str], None]
) -> Started:
    """Plan, hand out, start. `sites` has a host for each of the inventory, in its order. `note` is told where
    the run will be, and its keys, before anything of it is anywhere: whatever becomes of this process, it can
    be ended.

    When a host fails, nothing is left on any. What lives of the same recipe is given what it lacks: agents, a
    controller. Raises UsageError when the name is taken on the head, PlacementError, PortInUse, LaunchError.
    """
    async with _opened(sites) as opened:
        return await _start(checked, wanted, sites, note, opened)


@dataclass(frozen=True, slots=True)
class _Opened:
    """dynctl on a host, started and waiting to be told what to do."""

    call: asyncio.Future[Claim | Join]
    answer: asyncio.Task[Answer]


@asynccontextmanager
async def _opened(sites: Sequence[HostSite]) -> AsyncIterator[dict[str, _Opened]]:
    """dynctl on each host, which loads while the plan is made; what is told nothing ends with the block."""
    made = {}
    for site in sites:
        call: asyncio.Future[Claim | Join] = asyncio.get_running_loop().create_future()
        made[site.name] = _Opened(call, asyncio.create_task(site.ask(call, 2 * ANSWER_S)))
    try:
        yield made
    finally:
        tasks = [one.answer for one in made.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _start(
    checked: Checked,
    wanted: Wanted,
    sites: Sequence[HostSite],
    note: Callable[[Remote, str], None],
    opened: Mapping[str, _Opened],
) -> Started:
    name, head, lock = checked.loaded.recipe.name, sites[0], wanted.lock
    living = await head.ask(Look(name=name, lock=lock))
    if living.run_id:
        plan = Plan.from_json(living.plan)
    else:
        raise_first(wanted.missing)
        taken = {(site.name, port) for site in sites for port in site.taken}
        plan = build_plan(checked.loaded, checked.inventory, taken, contexts(sites, wanted.run_id))
        if not wanted.share_gpus:
            require_idle(plan, sites)
    used = [site for site in sites if any(node.name == site.name for node in plan.nodes)]
    adopted = bool(living.run_id)
    started = Started(
        plan,
        _remote(plan, used, checked),
        adopted,
        living.running,
        checked.inventory,
        await _secrets_of(head, plan.run_id) if adopted else _secrets(),
    )
    note(started.remote, started.secrets[KEYS_FILE])
    try:
        await _hand_out(started, wanted, used, opened)
    except BaseException:
        if not started.adopted:
            failed = await sweep(used, plan.run_id, 0.0)
            note(given_up(started.remote, failed), "")
        raise
    return started


def given_up(remote: Remote, failed: Mapping[str, DynctlError]) -> Remote:
    """The note of a run that did not come to be: it has ended, but for what may be left on some hosts."""
    return msgspec.structs.replace(remote, ended=not failed, left=sorted(failed))


async def _hand_out(
    started: Started, wanted: Wanted, sites: Sequence[HostSite], opened: Mapping[str, _Opened]
) -> None:
    """All at once: whether the name is free has been asked for, and is once more when the head takes it."""
    plan, head, secret = started.plan, sites[0], dict(started.secrets)
    claim = Claim(
        name=plan.name,
        run_id=plan.run_id,
        files={**run_files(plan, wanted.lock, started.inventory), **secret},
        spawn=[_spawn(plan.process(seat), plan) for seat in (f"agent-{head.name}", CONTROLLER)],
        adopt=started.adopted,
        gpus=_gpus(plan, head),
        share_gpus=wanted.share_gpus,
    )
    joins = [
        Join(
            name=plan.name,
            run_id=plan.run_id,
            node=site.name,
            files=secret,
            spawn=[_spawn(plan.process(f"agent-{site.name}"), plan)],
            gpus=_gpus(plan, site),
            share_gpus=wanted.share_gpus,
        )
        for site in sites[1:]
    ]
    calls: list[Claim | Join] = [claim, *joins]
    asked = []
    for site, call in zip(sites, calls, strict=True):
        if not opened[site.name].call.done():  # its time is up already
            opened[site.name].call.set_result(call)
        asked.append(opened[site.name].answer)
    answers = await asyncio.gather(*asked, return_exceptions=True)
    raise_first(answers)


def _gpus(plan: Plan, site: HostSite) -> list[int]:
    return [gpu for node in plan.nodes if node.name == site.name for gpu in node.gpus]


def require_idle(plan: Plan, sites: Iterable[HostSite]) -> None:
    """See that nobody uses the GPUs of the plan. Raises PlacementError that says who does."""
    for site in sites:
        taken = set(_gpus(plan, site))
        users = [f"GPU {gpu} by {site.busy[gpu]}" for gpu in sorted(taken.intersection(site.busy))]
        if users:
            raise PlacementError(f"in use already: {', '.join(users)}", where=site.name, hint=SHARE_HINT)


def _spawn(process: PlannedProcess, plan: Plan) -> Spawn:
    command = process.command
    endpoint = next((one.agent for one in plan.nodes if process.id == f"agent-{one.name}"), "")
    return Spawn(
        process_id=process.id,
        incarnation=1,
        argv=list(command.argv),
        env=dict(command.env),
        endpoint=endpoint,
    )


async def _secrets_of(head: HostSite, run_id: str) -> dict[str, str]:
    """The keys of a run that lives: a node may have lost its own."""
    found = {}
    for name in (KEYS_FILE, ENGINE_KEY_FILE):
        path = f"{head.home}/runs/{run_id}/{name}"
        done = await head.shell.run(("cat", "--", path), timeout_s=ANSWER_S)
        if done.code:
            raise LaunchError("the keys of the run cannot be read", where=f"{head.name}:{path}")
        found[name] = done.stdout.decode()
    return found


def _secrets() -> dict[str, str]:
    """Keys made for this run, as files."""
    with tempfile.TemporaryDirectory(prefix="dynctl-") as folder:
        keys, engine = Path(folder) / KEYS_FILE, Path(folder) / ENGINE_KEY_FILE
        Keys.generate().save(keys)
        save_engine_key(engine)
        return {KEYS_FILE: keys.read_text(), ENGINE_KEY_FILE: engine.read_text()}


def _remote(plan: Plan, sites: Sequence[HostSite], checked: Checked) -> Remote:
    hosts = [RemoteHost(name=s.name, python=s.python, home=s.home, ssh=s.ssh) for s in sites]
    recipe = str(Path(checked.loaded.file).resolve())
    at = plan.registry.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    direct = plan.registry if at and at == sites[0].dialled else ""
    return Remote(name=plan.name, run_id=plan.run_id, hosts=hosts, recipe=recipe, controller=direct)
