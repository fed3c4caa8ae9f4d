"""`up` on Slurm: on the login node check → claim the name → write the run → submit; in the job plan it.

The run directory is made before the job, on a disk that the nodes share, and holds the recipe with everything
resolved: the job plans that on the nodes it is given.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from dynctl.deploy.claim import Up
from dynctl.deploy.disk import disk
from dynctl.deploy.home import LOCK_S, RunDir, new_run_id
from dynctl.deploy.plan import Plan
from dynctl.deploy.planner import build_plan
from dynctl.deploy.ports import listening
from dynctl.deploy.records import initial_state
from dynctl.deploy.run import INVENTORY, Checked, Site
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_inventory import Allocation
from dynctl.deploy.slurm_script import JobContext, script_text
from dynctl.deploy.slurm_size import assumed, labelled, on_its_parts, size_of, without_spares
from dynctl.deploy.stage import staged_path
from dynctl.deploy.state import RunState, encode_state, load_state
from dynctl.errors import RecipeError, SlurmError, SlurmUnreachable, UsageError
from dynctl.launchers.base import ProcessHandle
from dynctl.launchers.files import write_atomic
from dynctl.launchers.local import write_files
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_job import ABANDONED, JobRecord, JobTable, load_record
from dynctl.recipe.check import check_recipe
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.lock import lock_text
from dynctl.recipe.override import VARIABLE
from dynctl.recipe.slurm import Slurm
from dynctl.topology.ports import first_port_of
from dynctl.transport.keys import Keys, save_engine_key

logger = logging.getLogger(__name__)

SCRIPT = "job.sbatch"
_LOOK_TIMES = 5
_LOOK_S = 1.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_slurm(loaded: LoadedRecipe, inventory: Path | None) -> Checked:
    """Judge, and see that it fits the job it would ask for. Raises DynctlError."""
    warnings = [str(w) for w in check_recipe(loaded)]
    if inventory is not None:
        raise UsageError("on Slurm the nodes are Slurm's to choose", hint="leave out --inventory")
    loaded, told = reachable(loaded)
    return Checked(loaded, assumed(loaded), (*warnings, *told, *_few_cpus(loaded)))


def _few_cpus(loaded: LoadedRecipe) -> tuple[str, ...]:
    """A warning, when engines with GPUs would share the one CPU that Slurm gives to a task."""
    options = loaded.recipe.slurm or Slurm()
    given = (
        options.exclusive or options.cpus_per_task or {"cpus-per-gpu", "exclusive"} & {*options.sbatch_args}
    )
    if given or not size_of(loaded).gpus:
        return ()
    told = "Slurm gives one CPU for each node unless told: set slurm.cpus_per_task or slurm.exclusive"
    return (f"{loaded.where('slurm')}: {told}",)


def reachable(loaded: LoadedRecipe) -> tuple[LoadedRecipe, tuple[str, ...]]:
    """The recipe with frontends that can be reached from other nodes, and what was changed for that."""
    frontend = loaded.recipe.frontend
    if frontend.host not in _LOOPBACK:
        return loaded, ()
    recipe = loaded.recipe.model_copy(update={"frontend": frontend.model_copy(update={"host": "0.0.0.0"})})
    told = f"{frontend.host} would be reached from its own node only: listening on 0.0.0.0 there"
    return replace(loaded, recipe=recipe), (f"{loaded.where('frontend.host')}: {told}",)


def submit(checked: Checked, site: Site, client: SlurmClient) -> Up:
    """Write the run and submit its job. Raises UsageError, RecipeError, PlacementError, SlurmError."""
    site.home.prepare()
    name = checked.loaded.recipe.name
    with site.home.locked(name, deadline_s=LOCK_S):
        _claim(name, site, client)
        run = submit_run(checked, site, client)
        site.home.point(name, run)
    record = load_record(run.path)
    number = record.job_id if record is not None else ""
    return Up(name, run, "", ProcessHandle(int(number or 0), 0, 0), adopted=False)


def submit_run(checked: Checked, site: Site, client: SlurmClient, avoid: str = "") -> RunDir:
    """Write a run of the recipe and submit its job, whatever else has the name. Raises as `submit`.

    `avoid` names nodes that this job is not to run on, beside those of the recipe.
    """
    run_id = new_run_id(checked.loaded.recipe.name, time.gmtime())
    context = JobContext(run_id, str(site.home.runs / run_id), site.python, str(site.home.root))
    script = script_text(_avoiding(checked.loaded, avoid), context)
    run = write_pending(checked, site, run_id, {SCRIPT: script})
    record = JobRecord(job_id="", name=run_id, submitted_at=time.time())
    with disk("the run directory cannot be written"):
        record.save(run.path)
    withheld = checked.loaded.secrets
    environ = {k: v for k, v in site.environ.items() if k not in withheld}
    record = _submitted(replace(client, environ=environ), record, run, script)
    with disk("the run directory cannot be written"):
        record.save(run.path)
    return run


def _avoiding(loaded: LoadedRecipe, nodes: str) -> LoadedRecipe:
    if not nodes:
        return loaded
    options = loaded.recipe.slurm or Slurm()
    excluded = ",".join(filter(None, (options.exclude, nodes)))
    slurm = options.model_copy(update={"exclude": excluded})
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"slurm": slurm}))


def begin_in_job(checked: Checked, site: Site) -> RunDir:
    """Write the run for the job that this process runs in. Raises UsageError, SlurmError, LaunchError."""
    job_id = site.environ.get("SLURM_JOB_ID", "")
    if not job_id:
        raise UsageError(
            "this does not run in a Slurm job", hint="leave out --in-job, and a job is submitted"
        )
    site.home.prepare()
    name = checked.loaded.recipe.name
    with site.home.locked(name, deadline_s=LOCK_S):
        _claim(name, site, SlurmClient(site.environ))
        run = write_pending(checked, site, new_run_id(name, time.gmtime()), {})
        record = JobRecord(
            job_id=job_id, name=site.environ.get("SLURM_JOB_NAME", ""), submitted_at=time.time()
        )
        with disk("the run directory cannot be written"):
            record.save(run.path)
        site.home.point(name, run)
    return run


def _claim(name: str, site: Site, client: SlurmClient) -> None:
    """Raises UsageError when a job of this name, or processes here, may still live; SlurmUnreachable."""
    run = site.home.run_of(name)
    if run is None:
        return
    ways = f"dynctl status {name} shows it, dynctl down {name} ends it"
    record = load_record(run.path)
    if record is None:
        if site.launcher.owned(run.run_id):
            raise UsageError(f"'{name}' is running already on this machine", where=str(run.path), hint=ways)
        return
    row = JobTable(client, [record]).row(record)
    if row is not None and (row.active or row.pending):
        state = "is running" if row.active else "is waiting"
        raise UsageError(f"'{name}' {state} already, as job {row.id}", where=str(run.path), hint=ways)


def write_pending(checked: Checked, site: Site, run_id: str, files: Mapping[str, str]) -> RunDir:
    """The directory of a run whose nodes are not known yet. Raises LaunchError, PlacementError."""
    lock = lock_text(checked.loaded, site.version)
    context = RunContext(run_id, str(site.home.runs / run_id), site.python, first_port_of(run_id))
    state = unplanned(build_plan(on_its_parts(checked.loaded), checked.inventory, (), context), time.time())
    made = {**files, "recipe.lock.yaml": lock, "state.json": encode_state(state).decode()}
    run = site.home.create_run(run_id, made)
    with disk("the run directory cannot be written"):
        Keys.generate().save(run.keys)
        save_engine_key(run.engine_key)
    return run


def unplanned(plan: Plan, now: float) -> RunState:
    """The state of a run that is to be planned elsewhere: its seats, on no node, reached nowhere."""
    state = initial_state(plan, now)
    state.url = state.registry = ""
    for seat in state.seats:
        seat.node = ""
    return state


def _submitted(client: SlurmClient, record: JobRecord, run: RunDir, script: str) -> JobRecord:
    """Submit, and when Slurm did not answer look whether it took the job all the same. Raises SlurmError."""
    try:
        job_id = client.submit(script, str(run.path))
    except SlurmUnreachable as error:
        job_id = _found(client, record)
        if not job_id:
            _abandon(run)
            raise SlurmUnreachable(
                f"{error.message}; there is no job, and one that starts all the same ends at once",
                hint=error.hint,
            ) from error
    except SlurmError:
        shutil.rmtree(run.path, ignore_errors=True)  # there is no job, and nothing in it that tells more
        raise
    logger.info("job.submitted id=%s name=%s", job_id, record.name)
    return JobRecord(job_id=job_id, name=record.name, submitted_at=record.submitted_at)


def _found(client: SlurmClient, record: JobRecord) -> str:
    for _ in range(_LOOK_TIMES):
        try:
            rows = client.jobs([record.name])
        except SlurmUnreachable:
            return ""
        if rows:
            return rows[-1].id.split("+")[0]
        time.sleep(_LOOK_S)
    return ""


def _abandon(run: RunDir) -> None:
    with disk("the run directory cannot be written"):
        write_atomic(run.path / ABANDONED, "")


OnStage = Callable[[str, str, Sequence[str]], None]
"""(source directory, target directory, nodes): copies a model to the nodes' own disks. Raises LaunchError."""


def plan_in_job(run: RunDir, given: Allocation, environ: Mapping[str, str], on_stage: OnStage) -> RunState:
    """Plan the run's recipe on the job's nodes and write plan, files and state. Raises DynctlError."""
    inventory, groups = given.inventory, given.site.groups
    clean = {k: v for k, v in environ.items() if k != VARIABLE}
    loaded = load_recipe(run.lock, environ=clean)
    check_recipe(loaded)
    before = load_state(run.state)
    context = RunContext(run.run_id, str(run.path), sys.executable, first_port_of(run.run_id))
    head = inventory.hosts[0].name
    staged = staged_recipe(loaded)
    inventory = labelled(loaded, inventory, groups)
    first = without_spares(loaded, inventory)
    plan = build_plan(on_its_parts(staged), first, {(head, port) for port in listening()}, context)
    if staged is not loaded:
        engines = [process.node for process in plan.processes if process.kind == "engine"]
        if (loaded.recipe.slurm or Slurm()).spares:
            engines = [host.name for host in inventory.hosts]  # any may come to have one
        on_stage(loaded.model.directory, staged.recipe.model.path, list(dict.fromkeys(engines)))
    state = initial_state(plan, before.created_at if before is not None else time.time())
    with disk("the run directory cannot be written"):
        for process in plan.processes:
            write_files(run.path, process.command.files)
        write_atomic(run.path / INVENTORY, msgspec.json.encode(inventory))
        write_atomic(run.plan, plan.to_json())
        write_atomic(run.state, encode_state(state))
    return state


def staged_recipe(loaded: LoadedRecipe) -> LoadedRecipe:
    """The recipe with the model where it is to be copied to, and the hub out of reach of the engines.

    The same when nothing is to be copied. Raises RecipeError when there is no model at hand to copy.
    """
    recipe, stage = loaded.recipe, (loaded.recipe.slurm or Slurm()).stage
    if not stage:
        return loaded
    if not os.path.isdir(loaded.model.directory):
        told = f"there is no copy of {recipe.model.path} that the nodes could take"
        hint = "download it to the shared Hugging Face cache, or let model.path name a directory"
        raise RecipeError(told, where=loaded.where("slurm.stage"), hint=hint)
    path = staged_path(loaded.model.directory, os.path.expandvars(stage))
    model = recipe.model.model_copy(update={"path": path, "revision": ""})
    engine = recipe.engine.model_copy(update={"env": {"HF_HUB_OFFLINE": "1", **recipe.engine.env}})
    return replace(loaded, recipe=recipe.model_copy(update={"model": model, "engine": engine}))
