"""The measuring part of `dynctl profile`: what it needs is put together, watched, interrupted and told."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from dynctl.cli.profile_progress import Progress
from dynctl.cli.render import prose
from dynctl.deploy.preflight import require_startable
from dynctl.deploy.slurm_up import check_slurm
from dynctl.engines.base import EngineEnvironment
from dynctl.engines.catalog import get
from dynctl.errors import UsageError
from dynctl.http.runtime import run as run_loop
from dynctl.profiler.estimators import Guess
from dynctl.profiler.journal import FILE, Journal
from dynctl.profiler.measure import Found, measure
from dynctl.profiler.outcome import Measurement
from dynctl.profiler.service import Asked
from dynctl.profiler.stage import Slots, Stage
from dynctl.profiler.starts import Starts
from dynctl.recipe.load import LoadedRecipe
from dynctl.topology.inventory_file import inventory_for

_VERSION_S = 60.0
_WILD = 100.0
"""How far a guess may be off: measured points alone count."""
_MANY = 64


@dataclass(frozen=True, slots=True)
class How:
    """How the user wants it. `gpu`: what --gpu said."""

    budget_s: float
    resume: bool
    parallel: int
    inventory: Path | None
    gpu: str


def measured_choice(asked: Asked, folder: Path, how: How) -> Found:
    """Measure, choose and try; on Ctrl-C or SIGTERM KeyboardInterrupt, when all that was started is ended."""
    recipe = asked.loaded.recipe
    if on_gpus(asked) and recipe.target == "local" and asked.inventory.source.endswith(" GPUs"):
        raise UsageError(
            "no GPU is found on this machine to measure with",
            where=asked.loaded.where("target"),
            hint="--estimate-only, or --target ssh or slurm",
        )
    if recipe.target == "slurm":
        check_slurm(asked.loaded, how.inventory)
    else:
        require_startable(asked.loaded, inventory_for(recipe, asked.loaded.file, how.inventory))
    run = secrets.token_hex(4)
    journal = Journal(folder / FILE, run, resume=how.resume, clock=time.time)
    try:
        with Progress(how.budget_s) as shown:
            stage = stage_of(asked, folder, how, (run, journal, shown))
            if journal.left:
                prose(f"ending {len(journal.left)} deployments that an earlier run has left", style="warning")
            found = run_loop(_interruptible(stage, how.budget_s))
    finally:
        journal.close()
    for name in stage.lingering:
        prose(f"{name} may be left running: dynctl down {name.split(':')[0]} ends it", style="warning")
    for name in stage.kept:
        prose(f"of {name} the logs are kept: dynctl logs {name}; dynctl down {name} --remove removes them")
    if found is None:
        prose("interrupted: what was started is ended, --resume goes on from here")
        raise KeyboardInterrupt
    return found


def stage_of(asked: Asked, folder: Path, how: How, parts: tuple[str, Journal, Progress]) -> Stage:
    """All that the run needs, on this machine and for this user."""
    run, journal, shown = parts
    recipe = asked.loaded.recipe
    options = [] if how.inventory is None else ["--inventory", str(how.inventory)]
    hosts = hosts_of(asked, how) if recipe.target == "ssh" else ()
    # By SSH nobody keeps two deployments from the same GPUs but the slots, which need to know them.
    one_by_one = recipe.target == "ssh" and not hosts and on_gpus(asked)
    return Stage(
        asked=asked,
        run=run,
        folder=folder,
        starts=Starts(run, dict(os.environ), tuple(options)),
        journal=journal,
        slots=Slots(asked.gpus, how.parallel or (1 if one_by_one else _MANY), hosts),
        shown=shown,
        ends_s=time.monotonic() + how.budget_s,
        api_key=secrets.token_urlsafe(24),
        tokenizer=asked.loaded.model.tokenizer,
        hardware=how.gpu or recipe.engine.device,
        version=engine_version(asked.loaded),
        spread=_WILD if isinstance(asked.estimator, Guess) else 1.0,
    )


def hosts_of(asked: Asked, how: How) -> tuple[tuple[str, int], ...]:
    """The hosts by SSH and how many GPUs each has, by which candidates get hosts of their own; () when some
    do not tell.
    """
    there = inventory_for(asked.loaded.recipe, asked.loaded.file, how.inventory)
    hosts = tuple((host.name, host.gpus) for host in there.hosts)
    return hosts if all(gpus for _, gpus in hosts) else ()


def on_gpus(asked: Asked) -> bool:
    """Whether the engine runs on GPUs: not simulated, not on CPUs."""
    recipe = asked.loaded.recipe
    return get(recipe.backend).features.gpus and recipe.engine.device == "gpu"


def engine_version(loaded: LoadedRecipe) -> str:
    """What the engine here says of its version; "" when it is elsewhere or says nothing."""
    given = loaded.recipe.engine
    where = EngineEnvironment(given.venv or "", given.python or "", given.container or "")
    inquiry = get(loaded.recipe.backend).inquiry(where)
    if loaded.recipe.target != "local" or inquiry is None or not inquiry.version:
        return ""
    try:
        done = subprocess.run(
            inquiry.version, capture_output=True, text=True, timeout=_VERSION_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = done.stdout.split()
    return said[-1] if said and not done.returncode else ""


async def _interruptible(stage: Stage, budget_s: float) -> Found | None:
    """The result; None when it was interrupted, once all is ended. Further signals change nothing."""
    work = asyncio.create_task(measure(stage, budget_s))
    loop, told = asyncio.get_running_loop(), False

    def interrupt() -> None:
        nonlocal told
        if not told:
            told = True
            work.cancel()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, interrupt)
    try:
        await asyncio.wait((work,))
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
    return None if work.cancelled() else work.result()


def tell_measured(found: Measurement, usable: bool) -> None:
    """What came of it in one line, for people."""
    prose(found.verdict, style="good" if usable and found.verdict.startswith("confirmed") else "warning")
    if found.unmeasured:
        prose(f"left open by the budget: {', '.join(found.unmeasured)}", style="warning")
