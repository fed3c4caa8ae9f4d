"""`up` in small steps: check the recipe → claim the name → plan on free ports → write the run → start."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from dynctl import procfs
from dynctl.deploy.claim import Up, may_adopt, new_controller
from dynctl.deploy.gpus import FILE as GPUS_FILE
from dynctl.deploy.gpus import claim_of, locked, require_free, too_few
from dynctl.deploy.gpus import others as gpus_of_others
from dynctl.deploy.home import LOCK_S, Home, RunDir, make_private, new_run_id
from dynctl.deploy.plan import Kept, Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.ports import holder, listen_error, listening
from dynctl.deploy.preflight import require_certificate, require_programs, require_startable
from dynctl.deploy.records import initial_state
from dynctl.deploy.seats import RunContext
from dynctl.deploy.state import (
    ENDED,
    RunState,
    encode_state,
    load_state,
    readable_state,
    save_state,
)
from dynctl.deploy.stop import CONTROLLER
from dynctl.errors import CodecError, LaunchError, PlacementError, PortInUse, RecipeError
from dynctl.launchers.base import Launch, Launcher, RunRef
from dynctl.launchers.files import write_atomic
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.topology.inventory import LOCAL, Inventory
from dynctl.topology.inventory_file import inventory_for
from dynctl.topology.ports import first_port_of
from dynctl.transport.keys import Keys, save_engine_key

logger = logging.getLogger(__name__)

_YOUNG_S = 30.0
_PORTS = ".ports"
INVENTORY = "inventory.json"
"""In a run's directory: the hosts it was planned on, to plan on them again."""


@dataclass(frozen=True, slots=True)
class UpRequest:
    """What the user asked for."""

    recipe: Path
    sets: Sequence[str] = ()
    unsets: Sequence[str] = ()
    inventory: Path | None = None


@dataclass(frozen=True, slots=True)
class Site:
    """Where and with what it is to run: `python` runs dynctl, `version` is dynctl's."""

    home: Home
    launcher: Launcher
    environ: Mapping[str, str]
    python: str
    version: str


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that may be started here."""

    loaded: LoadedRecipe
    inventory: Inventory
    warnings: tuple[str, ...]


def check(request: UpRequest) -> Checked:
    """Load, judge, and see that it can run on this machine. Raises RecipeError."""
    loaded = load_recipe(request.recipe, tuple(request.sets), tuple(request.unsets))
    warnings = check_recipe(loaded)
    inventory = inventory_for(loaded.recipe, loaded.file, request.inventory)
    require_startable(loaded, inventory)
    return Checked(loaded, inventory, tuple(str(w) for w in warnings))


def start(checked: Checked, site: Site, *, share_gpus: bool = False) -> Up:
    """Write the run and start its controller, or start a new controller for what still lives of it.

    Raises UsageError when the name is taken, PortInUse, PlacementError, RecipeError, LaunchError.
    """
    site.home.prepare()
    name = checked.loaded.recipe.name
    with site.home.locked(name, deadline_s=LOCK_S):
        living = claim(checked, site)
        if living is not None:
            return adopt(living, checked, site)
        return begin(checked, site, share_gpus=share_gpus)


def claim(checked: Checked, site: Site) -> RunDir | None:
    """The run of this name whose processes live on without a controller; None when nothing of it lives.

    Raises UsageError when the name is taken: it runs, or what lives is of another recipe.
    """
    name = checked.loaded.recipe.name
    return may_adopt(site.home, site.launcher, name, lock_text(checked.loaded, site.version))


def adopt(run: RunDir, checked: Checked, site: Site) -> Up:
    """Start a new controller on a run whose processes live."""
    make_private(run.path)
    found = load_state(run.state)
    if found is None:
        raise LaunchError("the run has no state", where=str(run.state))
    plan = Plan.from_json(run.plan.read_bytes())
    state = new_controller(found)
    with _disk_of(run):
        save_state(run.state, state)
    launch = controller_of(plan, state.controller.incarnation, checked)
    handle = site.launcher.start(launch, RunRef(run.run_id, run.path))
    return Up(state.name, run, state.url, handle, adopted=True)


def begin(checked: Checked, site: Site, *, share_gpus: bool = False) -> Up:
    """Plan and write a new run, and start its controller."""
    name = checked.loaded.recipe.name
    run_id = new_run_id(name, time.gmtime())
    context = RunContext(run_id, str(site.home.runs / run_id), site.python, first_port_of(run_id))
    # One at a time from looking at ports until the run that has them is written down.
    with site.home.locked(_PORTS, deadline_s=LOCK_S), locked(site.home):
        plan = plan_run(checked, site, context) if share_gpus else _on_free_gpus(checked, site, context)
        require_programs(plan, checked.loaded, site.environ)
        require_certificate(checked.loaded)
        gpus = [gpu for node in plan.nodes for gpu in node.gpus]
        if not share_gpus:
            require_free(site.home, gpus)
        run = write_run(plan, lock_text(checked.loaded, site.version), checked.inventory, site.home)
        if share_gpus:
            with _disk_of(run):
                write_atomic(run.path / GPUS_FILE, claim_of(name, run_id, gpus, shared=True))
        handle = site.launcher.start(controller_of(plan, 1, checked), RunRef(run.run_id, run.path))
    return Up(name, run, plan.url, handle, adopted=False)


def _on_free_gpus(checked: Checked, site: Site, context: RunContext) -> Plan:
    """The plan on GPUs that no other run has. Raises PlacementError that tells who has the others, where that
    is all that is in the way.
    """
    others = gpus_of_others(site.home)
    taken = frozenset((host.name, gpu) for host in checked.inventory.hosts for gpu in others)
    try:
        return plan_run(checked, site, context, taken)
    except PlacementError:
        if not taken:
            raise
        plan_run(checked, site, context)
        raise too_few(others) from None


def plan_run(
    checked: Checked, site: Site, context: RunContext, others: frozenset[tuple[str, int]] = frozenset()
) -> Plan:
    """The plan on free ports, without the GPUs of `others` (node, index). Raises PortInUse that says who has
    the frontend's.
    """
    loaded = checked.loaded
    port, host = loaded.recipe.frontend.port, loaded.recipe.frontend.host
    reserved = reserved_ports(site)
    taken = set(listening()) | reserved
    if port and port not in reserved:
        error = listen_error(host, port)
        taken.discard(port)
        if error is not None:
            if error.errno != errno.EADDRINUSE:
                raise _cannot_listen(loaded, error)
            taken.add(port)
    try:
        kept = Kept({}, {}, others)
        return build_plan(loaded, checked.inventory, {(LOCAL, p) for p in taken}, context, kept)
    except PortInUse as error:
        who = holder(port)
        message = f"{error.message} by {who}" if who else error.message
        raise PortInUse(message, where=error.where, hint=error.hint) from error


def _cannot_listen(loaded: LoadedRecipe, error: OSError) -> RecipeError:
    frontend = loaded.recipe.frontend
    field = "frontend.port" if error.errno == errno.EACCES else "frontend.host"
    hint = "ports below 1024 are for root" if error.errno == errno.EACCES else "an address of this machine"
    message = f"cannot listen on {frontend.host} port {frontend.port}: {error.strerror or error}"
    return RecipeError(message, where=loaded.where(field), hint=hint)


def reserved_ports(site: Site) -> set[int]:
    """Ports of deployments that run or are being started, though nobody may listen on them yet.

    A run whose plan cannot be read is left out, with a warning, when no process of it lives. Raises
    CodecError when one does.
    """
    found: set[int] = set()
    for name in site.home.names():
        run = site.home.run_of(name)
        state = readable_state(run.state) if run else None
        if run is None or state is None or not _may_live(state, time.time()):
            continue
        plan = _plan_of(name, run, site.launcher)
        if plan is not None:
            found.update(port for node in plan.nodes for port in node.ports if node.name == LOCAL)
    return found


def _plan_of(name: str, run: RunDir, launcher: Launcher) -> Plan | None:
    """The plan of a run; None when it cannot be read and nothing of the run lives."""
    try:
        return Plan.from_json(run.plan.read_bytes())
    except (OSError, CodecError) as error:
        if launcher.owned(run.run_id):
            hint = (
                f"processes of '{name}' still run, on ports only its plan tells; dynctl down {name} ends them"
            )
            raise CodecError(f"the plan cannot be read: {error}", where=str(run.plan), hint=hint) from error
        logger.warning("plan.unreadable path=%s error=%s: none of its processes lives", run.plan, error)
        return None


def _may_live(state: RunState, now: float) -> bool:
    if state.phase in ENDED:
        return False
    pids = [(state.controller.pid, state.controller.start_ticks)]
    pids += [(seat.pid, seat.start_ticks) for seat in state.seats]
    return any(procfs.alive(pid, ticks) for pid, ticks in pids) or 0 <= now - state.created_at < _YOUNG_S


def write_run(plan: Plan, lock: str, inventory: Inventory, home: Home) -> RunDir:
    """Make the run directory, whole, and let the name mean it. Raises LaunchError."""
    run = home.create_run(plan.run_id, run_files(plan, lock, inventory))
    with _disk_of(run):
        Keys.generate().save(run.keys)
        save_engine_key(run.engine_key)
    home.point(plan.name, run)
    return run


def run_files(plan: Plan, lock: str, inventory: Inventory | None = None) -> dict[str, str]:
    """What a run's directory begins with, but for its keys."""
    state = initial_state(plan, time.time())
    gpus = [gpu for node in plan.nodes if node.name == state.head for gpu in node.gpus]
    return {
        **({INVENTORY: msgspec.json.encode(inventory).decode()} if inventory else {}),
        "plan.json": plan.to_json(),
        "recipe.lock.yaml": lock,
        "state.json": encode_state(state).decode(),
        GPUS_FILE: claim_of(plan.name, plan.run_id, gpus),
    }


def controller_of(plan: Plan, incarnation: int, checked: Checked) -> Launch:
    """The start of a run's controller; it and all it starts do without the variables that hold secrets."""
    process = plan.process(CONTROLLER)
    return Launch(CONTROLLER, incarnation, process.command, process.node, checked.loaded.secrets)


@contextmanager
def _disk_of(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LaunchError(
            f"the run directory cannot be written: {error.strerror}", where=str(run.path)
        ) from error
