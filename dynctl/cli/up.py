"""`dynctl up`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.attended import Detach, Timeout, attended
from dynctl.cli.exits import INTERRUPTED
from dynctl.cli.pick import home, launcher_of
from dynctl.cli.render import prose
from dynctl.deploy.audit import actor, note
from dynctl.deploy.home import RunDir
from dynctl.deploy.planner import build_plan
from dynctl.deploy.run import Checked, Site, UpRequest, check, start
from dynctl.deploy.seats import RunContext
from dynctl.deploy.slurm_up import begin_in_job, check_slurm, submit
from dynctl.deploy.stop import Stopper
from dynctl.errors import UsageError
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.day2 import Actor
from dynctl.recipe.load import load_recipe

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before GPUs are taken.")]
InJob = Annotated[
    bool,
    typer.Option("--in-job", help="Use the Slurm job that this runs in, and stay until it is over."),
]
Bootstrap = Annotated[
    bool, typer.Option("--bootstrap", help="Target ssh: install this dynctl on hosts that lack it.")
]
ShareGpus = Annotated[bool, typer.Option("--share-gpus", help="Also take GPUs that others use.")]
Wheelhouse = Annotated[
    Path | None,
    typer.Option(
        "--wheelhouse",
        metavar="DIR",
        help="With --bootstrap: wheels of all it needs, for hosts without network.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Change it also when it is locked.")]


def up(  # noqa: PLR0913 - one parameter for each option of the verb
    recipe: options.Recipe,
    detach: Detach = False,
    yes: Yes = False,
    timeout: Timeout = None,
    target: options.Target = None,
    inventory: options.Inventory = None,
    in_job: InJob = False,
    bootstrap: Bootstrap = False,
    wheelhouse: Wheelhouse = None,
    share_gpus: ShareGpus = False,
    sets: options.Set = None,
    unsets: options.Unset = None,
    force: Force = False,
    as_json: options.Json = False,
) -> int:
    """Start what a recipe says and serve it.

    Stays and shows the deployment; Ctrl-C leaves it running. If it cannot become ready, nothing is left
    running. On the name of a deployment that runs: shows what would change, asks, and changes it one replica
    at a time. On one whose controller has died: a new controller takes over what still lives.
    On Slurm: submits the job and waits for it; Ctrl-C leaves it in the queue.
    """
    target = "slurm" if in_job else target
    request = UpRequest(recipe, options.with_target(sets, target), unsets or (), inventory)
    checked = judged(request)
    for warning in checked.warnings:
        prose(warning, style="warning")
    if not yes and not confirmed(checked):
        prose("nothing was started")
        return INTERRUPTED
    refuse_others(checked.loaded.recipe.name, checked.loaded.recipe.target)
    if checked.loaded.recipe.target == "ssh":
        from dynctl.cli.limit import Limit
        from dynctl.cli.up_ssh import How, up_over_ssh
        from dynctl.cli.up_ssh_again import Change

        change = Change(yes, force, as_json)
        how = How(detach, Limit.of(timeout), as_json, bootstrap, wheelhouse, share_gpus, change)
        return up_over_ssh(checked, how)
    launcher, way = LocalLauncher(), Way(detach, yes, timeout, as_json, share_gpus)
    who = actor("up", [str(recipe), *(sets or ())], force=force)
    if in_job:
        return stay_in_job(begin_in_job(checked, site(launcher)))
    if checked.loaded.recipe.target == "slurm":
        return by_slurm(checked, launcher, who, way)
    return here(checked, launcher, who, way)


@dataclass(frozen=True, slots=True)
class Way:
    """How the user wants it on this machine."""

    detach: bool
    yes: bool
    timeout_s: float | None
    as_json: bool
    share_gpus: bool


def by_slurm(checked: Checked, launcher: LocalLauncher, who: Actor, way: Way) -> int:
    """Submit it as a job, or change what runs as one under its name; the exit code."""
    from dynctl.cli.amend import Asked, supervised_job, up_again

    run = supervised_job(checked.loaded.recipe.name)
    if run is not None:
        return up_again(checked, run, who, Asked(way.timeout_s, way.yes, way.as_json))
    submitted = submit(checked, site(launcher), SlurmClient())
    stopper = Stopper(launcher_of(submitted.run))
    return attended(submitted, stopper, way.timeout_s, detach=way.detach, as_json=way.as_json)


def here(checked: Checked, launcher: LocalLauncher, who: Actor, way: Way) -> int:
    """Start it on this machine, or change what runs there under its name; the exit code."""
    from dynctl.cli.amend import Asked, supervised, up_again

    run = supervised(checked.loaded.recipe.name, launcher)
    if run is not None:
        return up_again(checked, run, who, Asked(way.timeout_s, way.yes, way.as_json))
    started = start(checked, site(launcher), share_gpus=way.share_gpus)
    note(started.run, who, "done")
    if started.adopted:
        prose(f"{started.name}: a new controller takes over what lives")
    try:
        return attended(started, Stopper(launcher), way.timeout_s, detach=way.detach, as_json=way.as_json)
    finally:
        launcher.release(started.controller)


def judged(request: UpRequest) -> Checked:
    """The recipe, checked for the target it names. Raises RecipeError, PlacementError."""
    loaded = load_recipe(request.recipe, tuple(request.sets), tuple(request.unsets))
    return check_slurm(loaded, request.inventory) if loaded.recipe.target == "slurm" else check(request)


def refuse_others(name: str, target: str) -> None:
    """Raises UsageError when the name is that of a deployment which runs on another target."""
    ways = f"dynctl status {name} shows it, dynctl down {name} ends it"
    note, run = home().note_of(name), home().run_of(name)
    if note is not None and target != "ssh":
        if b'"ended":false' in note.remote.read_bytes():
            raise UsageError(f"'{name}' runs on hosts by SSH already", where=str(note.path), hint=ways)
        note.remote.unlink()
    launcher = launcher_of(run) if run is not None else None
    kind = "slurm" if isinstance(launcher, JobLauncher) else "local"
    if run is None or launcher is None or kind == target or (target == "ssh" and note is not None):
        return
    if launcher.owned(run.run_id):
        what = "is a job on Slurm" if kind == "slurm" else "runs on this machine"
        raise UsageError(f"'{name}' {what} already", where=str(run.path), hint=ways)


def stay_in_job(run: RunDir) -> int:
    """Become the controller of this run."""
    prose(f"run: {run.path}")
    argv = [sys.executable, "-u", "-m", "dynctl.controller.slurm_keeper", "--run-dir", str(run.path)]
    os.execv(sys.executable, argv)


def site(launcher: LocalLauncher) -> Site:
    """This machine, this user, this python."""
    return Site(home(), launcher, os.environ, sys.executable, metadata.version("dynctl"))


def confirmed(checked: Checked) -> bool:
    """Ask a person before GPUs are taken; true off a terminal, and when none are."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    if checked.loaded.recipe.target == "slurm" or checked.inventory.undiscovered():
        return True  # they are Slurm's to give, or not counted yet
    preview = RunContext("RUN_ID", "RUN_DIR", sys.executable)
    plan = build_plan(checked.loaded, checked.inventory, (), preview)
    gpus = sum(len(node.gpus) for node in plan.nodes)
    if not gpus:
        return True
    names = ", ".join(node.name for node in plan.nodes)
    return typer.confirm(f"start {plan.name} on {names} with {gpus} GPUs?", default=True, err=True)
