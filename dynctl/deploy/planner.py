"""Makes a plan of a recipe: places, gives ports, writes every command.

Pure and deterministic: the same recipe, inventory, taken ports and run make the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from dynctl.command import Command
from dynctl.deploy.plan import Kept, Plan, PlannedNode, PlannedProcess
from dynctl.deploy.seats import (
    Endpoints,
    Seat,
    Site,
    agent_command,
    controller_command,
    engine_command,
    engine_launch,
    frontend_command,
    worker_command,
)
from dynctl.deploy.seats import (
    RunContext as RunContext,
)
from dynctl.engines import catalog
from dynctl.engines.base import Engine, EngineLaunch, Rank
from dynctl.errors import PlacementError, PortInUse
from dynctl.protocol.instances import Role
from dynctl.recipe.check import parallel_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.schema import Recipe
from dynctl.topology.inventory import Host, Inventory
from dynctl.topology.placement import Need, Placement, place
from dynctl.topology.ports import PortAllocator


def build_plan(
    loaded: LoadedRecipe,
    inventory: Inventory,
    taken_ports: Iterable[tuple[str, int]],
    run: RunContext,
    kept: Kept | None = None,
) -> Plan:
    """Place roles on nodes and GPUs, allocate ports, write every command. What is `kept` stays where it is.

    `taken_ports` are (node name, port) that others hold. The recipe must have passed `check_recipe`. Raises
    PlacementError when it does not fit, PortInUse when the frontend's own port is taken.
    """
    recipe = loaded.recipe
    engine = catalog.get(recipe.backend)
    try:
        kept = kept or Kept({}, {})
        placement = place(needs(recipe, engine, inventory), inventory, kept.placement, kept.others)
    except PlacementError as error:
        raise PlacementError(error.message, where=loaded.where(error.where), hint=error.hint) from error
    ports = PortAllocator(taken_ports, run.first_port, kept.ports)
    head = inventory.hosts[0]
    doors = _frontend_hosts(loaded, inventory)
    public = _public_port(loaded, doors, ports)
    registry, membership = (
        ports.allocate([head.name], owner=f"controller:{what}") for what in ("registry", "membership")
    )
    endpoints = Endpoints(_tcp(head.address, registry), _tcp(head.address, membership))
    site = Site(recipe, engine, run, endpoints)
    processes = [
        PlannedProcess(
            id="controller",
            kind="controller",
            role="controller",
            index=0,
            node=head.name,
            command=controller_command(site, head.name),
            ports={"registry": registry, "membership": membership},
        ),
        *_frontends(site, doors, public, ports),
    ]
    for role in recipe.roles.present():
        processes += _workers(loaded, site, role, placement, ports)
    agents = _agents(site, inventory, ports) if recipe.target == "ssh" else {}
    processes[1:1] = agents.values()
    return Plan(
        name=recipe.name,
        run_id=run.run_id,
        target=recipe.target,
        backend=recipe.backend,
        model=recipe.model.name,
        url=_public_url(recipe, doors[0], public),
        registry=endpoints.registry,
        membership=endpoints.membership,
        roles={role: section.replicas for role, section in recipe.roles.present().items()},
        nodes=_nodes(site, inventory, placement, ports, agents),
        processes=tuple(processes),
    )


def needs(recipe: Recipe, engine: Engine, inventory: Inventory) -> list[Need]:
    """What is to be placed: each role with its replicas, their GPUs and where they may be."""
    gpus = engine.features.gpus and recipe.engine.device == "gpu"
    return [
        Need(
            role,
            section.replicas,
            parallel_of(section),
            gpus=gpus,
            multi_node=engine.features.multi_node,
            hosts=_hosts_of(inventory, section.hosts, f"roles.{role}.hosts"),
        )
        for role, section in recipe.roles.present().items()
    ]


def _hosts_of(inventory: Inventory, wanted: Sequence[str], field: str) -> tuple[str, ...]:
    """The names of the hosts meant. Raises PlacementError, its `where` being the field."""
    try:
        return tuple(host.name for host in inventory.select(wanted))
    except PlacementError as error:
        raise PlacementError(error.message, where=field, hint=error.hint) from error


def _workers(
    loaded: LoadedRecipe, site: Site, role: Role, placement: Placement, ports: PortAllocator
) -> list[PlannedProcess]:
    """All replicas of a role. Raises PlacementError when ports run out."""
    made: list[PlannedProcess] = []
    try:
        for index in range(site.recipe.roles.present()[role].replicas):
            made += _replica(site, role, index, placement[role, index], ports)
    except PlacementError as error:
        hint = f"{error.hint}; fewer replicas would fit"
        raise PlacementError(
            error.message, where=loaded.where(f"roles.{role}.replicas"), hint=hint
        ) from error
    return made


def _replica(
    site: Site, role: Role, index: int, ranks: tuple[Rank, ...], allocator: PortAllocator
) -> list[PlannedProcess]:
    """The sidecars of one replica, each followed by its part of the engine."""
    engine, section = site.engine, site.recipe.roles.present()[role]
    apart = role in ("prefill", "decode")
    transfer = site.recipe.engine.kv_transfer
    needs = engine.port_needs(role, parallel_of(section), disaggregated=apart, transfer=transfer)
    nodes = [rank.node for rank in ranks]
    owner = f"{role}-{index}/engine"
    ports = {name: allocator.allocate(nodes, count, f"{owner}:{name}") for name, count in needs.items()}
    launch = engine_launch(site, role, index, ranks, ports)
    commands: Sequence[Command | None] = engine.commands(launch) or [None]
    made: list[PlannedProcess] = []
    for number, command in enumerate(commands):
        made += _part(site, launch, number, command, allocator)
    also = tuple((rank.node, rank.gpus) for rank in ranks[len(commands) :])
    return [replace(made[0], also=also), *made[1:]]


def _part(
    site: Site, launch: EngineLaunch, number: int, command: Command | None, allocator: PortAllocator
) -> list[PlannedProcess]:
    """One sidecar and, when there is one to start, its part of the engine."""
    suffix = f".{number}" if number else ""
    replica = f"{launch.role}-{launch.index}"
    rank = launch.ranks[number]
    seat_id = replica + suffix
    own = {name: allocator.allocate([rank.node], owner=f"{seat_id}:{name}") for name in ("events", "control")}
    marked = engine_command(site, rank.node, seat_id, command) if command else None
    url = _engine_url(site.recipe, launch)
    seat = Seat(seat_id, launch, number, own, marked, url)
    sidecar = PlannedProcess(
        id=seat.id,
        kind="worker",
        role=launch.role,
        index=launch.index,
        node=rank.node,
        command=worker_command(site, seat),
        gpus=rank.gpus,
        ports=own,
        depends=("controller",),
    )
    if marked is None:
        return [sidecar]
    started = PlannedProcess(
        id=f"{replica}/engine{suffix}",
        kind="engine",
        role=launch.role,
        index=launch.index,
        node=rank.node,
        command=marked,
        gpus=rank.gpus,
        ports=launch.ports,
        depends=(seat.id,),
    )
    return [sidecar, started]


def _engine_url(recipe: Recipe, launch: EngineLaunch) -> str:
    urls = recipe.roles.present()[launch.role].urls
    if urls:
        return urls[launch.index].rstrip("/")
    return f"http://{_bracketed(launch.ranks[0].address)}:{launch.ports['http']}"


def _frontend_hosts(loaded: LoadedRecipe, inventory: Inventory) -> list[Host]:
    """The host of each frontend. Raises PlacementError for a name that is not in the inventory."""
    frontend = loaded.recipe.frontend
    try:
        hosts = inventory.select(frontend.hosts) or inventory.hosts[:1]
    except PlacementError as error:
        raise PlacementError(error.message, where=loaded.where("frontend.hosts"), hint=error.hint) from error
    doors = [hosts[index % len(hosts)] for index in range(frontend.replicas)]
    distinct = len({host.name for host in doors})
    if distinct > 1 and frontend.host not in ("0.0.0.0", "::"):
        raise PlacementError(
            f"frontends on {distinct} hosts cannot all listen on {frontend.host}",
            where=loaded.where("frontend.host"),
            hint="use 0.0.0.0 or ::",
        )
    return doors


def _public_port(loaded: LoadedRecipe, doors: Sequence[Host], ports: PortAllocator) -> int:
    """The port of all frontends, the same on each of their hosts."""
    port, nodes = loaded.recipe.frontend.port, list(dict.fromkeys(host.name for host in doors))
    if port == 0:
        return ports.allocate(nodes, owner="frontend-0:http")
    for node in nodes:
        if not ports.take(node, port, "frontend-0:http"):
            raise PortInUse(
                f"port {port} of {node} is taken",
                where=loaded.where("frontend.port"),
                hint="end what listens there, or --set frontend.port=PORT (0 takes a free one)",
            )
    return port


def _frontends(
    site: Site, doors: Sequence[Host], public: int, allocator: PortAllocator
) -> list[PlannedProcess]:
    """A frontend on each of `doors`. Several have ports to hear each other; on one host, to be told apart."""
    made = []
    for index, host in enumerate(doors):
        ports = {"http": public}
        if doors.count(host) > 1:
            ports["own"] = allocator.allocate([host.name], owner=f"frontend-{index}:own")
        if len(doors) > 1:
            ports["events"] = allocator.allocate([host.name], owner=f"frontend-{index}:events")
        made.append(
            PlannedProcess(
                id=f"frontend-{index}",
                kind="frontend",
                role="frontend",
                index=index,
                node=host.name,
                command=frontend_command(site, index, host, ports),
                ports=ports,
                depends=("controller",),
            )
        )
    return made


def _public_url(recipe: Recipe, head: Host, port: int) -> str:
    host = head.address if recipe.frontend.host in ("0.0.0.0", "::", "") else recipe.frontend.host
    return f"{'https' if recipe.frontend.tls else 'http'}://{_bracketed(host)}:{port}"


def _agents(site: Site, inventory: Inventory, ports: PortAllocator) -> dict[str, PlannedProcess]:
    """An agent on each host, by host: those that have nothing else to do may take over from others."""
    made = {}
    for index, host in enumerate(inventory.hosts):
        port = ports.allocate([host.name], owner=f"agent-{host.name}:control")
        made[host.name] = PlannedProcess(
            id=f"agent-{host.name}",
            kind="agent",
            role="agent",
            index=index,
            node=host.name,
            command=agent_command(site, host.name, _tcp(host.address, port)),
            ports={"control": port},
        )
    return made


def _nodes(
    site: Site,
    inventory: Inventory,
    placement: Placement,
    ports: PortAllocator,
    agents: Mapping[str, PlannedProcess],
) -> tuple[PlannedNode, ...]:
    """The nodes in use, in the order of the inventory."""
    ranks = [rank for replica in placement.values() for rank in replica]
    return tuple(
        PlannedNode(
            name=host.name,
            address=host.address,
            gpus=tuple(sorted(gpu for rank in ranks if rank.node == host.name for gpu in rank.gpus)),
            ports=ports.given(host.name),
            agent=_tcp(host.address, agents[host.name].ports["control"]) if host.name in agents else "",
            run_dir=site.run.on(host.name).run_dir if host.name in agents else "",
        )
        for host in inventory.hosts
        if ports.given(host.name)
    )


def _tcp(address: str, port: int) -> str:
    return f"tcp://{_bracketed(address)}:{port}"


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address
