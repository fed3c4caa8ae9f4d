"""The batch script of a deployment: how large its job is, its directives, what starts it. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from dynctl.deploy.slurm_size import Part, parts_of
from dynctl.errors import RecipeError
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.slurm import SbatchValue, Slurm

DRAIN_SIGNAL = "USR1"
"""What the batch script is sent ahead of the time limit."""
_PLAIN = re.compile(r"[\w@%+=:,./\[\]&|*()-]*", re.ASCII)
_OWNED = {
    "job-name": "nothing: jobs are found by it",
    "output": "nothing: it goes to the run directory",
    "error": "nothing: it goes to the run directory",
    "array": "nothing: a deployment is one job",
    "wrap": "nothing: dynctl writes the script",
    "parsable": "nothing: dynctl reads the answer",
    "ntasks": "slurm.nodes",
    "ntasks-per-node": "slurm.nodes",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "qos": "slurm.qos",
    "time": "slurm.time",
    "nodes": "slurm.nodes",
    "gpus-per-node": "slurm.gpus_per_node",
    "gres": "slurm.gres",
    "cpus-per-task": "slurm.cpus_per_task",
    "mem": "slurm.mem",
    "constraint": "slurm.constraint",
    "exclude": "slurm.exclude",
    "nodelist": "slurm.nodelist",
    "exclusive": "slurm.exclusive",
    "reservation": "slurm.reservation",
    "comment": "slurm.comment",
    "no-kill": "slurm.no_kill",
    "hetjob": "slurm.het",
    "signal": "slurm.warning",
}
_LEAST_WARNING_S = 60.0
"""Slurm counts in minutes, and may warn so much earlier than asked."""


@dataclass(frozen=True, slots=True)
class JobContext:
    """What differs from job to job: its name, the run directory (absolute), the Python that has dynctl."""

    name: str
    run_dir: str
    python: str
    home: str


def script_text(loaded: LoadedRecipe, context: JobContext) -> str:
    """The whole script. Raises PlacementError, RecipeError."""
    lines = ["#!/bin/bash"]
    for number, part in enumerate(parts_of(loaded)):
        lines += ["#SBATCH hetjob"] if number else []
        lines += [f"#SBATCH {line}" for line in directives(loaded, part, context, first=not number)]
    run, python = shlex.quote(context.run_dir), shlex.quote(context.python)
    resubmit = " --resubmit" if (loaded.recipe.slurm or Slurm()).resubmit else ""
    return "\n".join(
        [
            *lines,
            f"export DYNCTL_HOME={shlex.quote(context.home)}",
            f"cd {run} || exit 1",
            'echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID has started on $SLURM_JOB_NODELIST"',
            f"exec {python} -u -m dynctl.controller.slurm_keeper --run-dir {run}{resubmit}",
            "",
        ]
    )


def directives(loaded: LoadedRecipe, part: Part, context: JobContext, *, first: bool) -> list[str]:
    """What follows `#SBATCH ` on each line of a part. What is about the batch script is said in the first."""
    options = loaded.recipe.slurm or Slurm()
    refuse_owned(loaded, options.sbatch_args)
    _refuse_short(loaded, options)
    given: dict[str, SbatchValue | int | None] = {
        "job-name": context.name,
        **nodes_wanted(loaded, part),
        "comment": options.comment,
        "output": f"{no_pattern(context.run_dir)}/logs/controller.log" if first else None,
        "open-mode": "append" if first else None,
        "signal": _warning(options) if first else None,
        "no-kill": options.no_kill or options.spares > 0,
        "no-requeue": not {"requeue", "no-requeue"} & set(options.sbatch_args),
        **options.sbatch_args,
    }
    return [_directive(name, value) for name, value in given.items() if value not in (None, "", False)]


def nodes_wanted(loaded: LoadedRecipe, part: Part) -> dict[str, SbatchValue | int | None]:
    """The options that say which nodes a part gets, on whose account and for how long; None, "" = none."""
    options, own, size = loaded.recipe.slurm or Slurm(), part.options, part.size
    return {
        "partition": own.partition,
        "account": options.account,
        "qos": options.qos,
        "nodes": size.nodes,
        "ntasks-per-node": 1,
        "gres": own.gres,
        "gpus-per-node": size.gpus if size.gpus and not own.gres else None,
        "cpus-per-task": own.cpus_per_task,
        "mem": own.mem,
        "time": slurm_time(options.time) if options.time is not None else None,
        "constraint": own.constraint,
        "exclude": own.exclude,
        "nodelist": own.nodelist,
        "exclusive": own.exclusive,
        "reservation": options.reservation,
    }


def refuse_owned(loaded: LoadedRecipe, given: Mapping[str, SbatchValue]) -> None:
    """Options that a field of the recipe sets, or that would hide the job. Raises RecipeError."""
    for name in given:
        owner = _OWNED.get(name)
        if owner is None:
            continue
        where = loaded.where(f"slurm.sbatch_args.{name}")
        if owner.startswith("nothing: "):
            raise RecipeError(f"'{name}' cannot be given: {owner.removeprefix('nothing: ')}", where=where)
        raise RecipeError(f"'{name}' is set by dynctl, from {owner}: set it there", where=where)


def _refuse_short(loaded: LoadedRecipe, options: Slurm) -> None:
    """A time limit that leaves no time to serve. Raises RecipeError."""
    least = max(options.warning, options.resubmit) + _LEAST_WARNING_S
    if options.time is None or options.time >= least:
        return
    told = f"a time limit of {options.time:g} s is too short: it drains {options.warning:g} s ahead"
    hint = f"at least {least:g} s, or a shorter slurm.warning"
    raise RecipeError(told, where=loaded.where("slurm.time"), hint=hint)


def slurm_time(seconds: float) -> str:
    """D-HH:MM:SS; Slurm rounds up to minutes."""
    whole = ceil(seconds)
    days, rest = divmod(whole, 86400)
    return f"{days}-{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"


def _warning(options: Slurm) -> str | None:
    """Slurm sends it up to 60 s early. Without a time limit of ours it refers to the partition's."""
    ahead = ceil(max(options.warning, options.resubmit))
    return f"B:{DRAIN_SIGNAL}@{ahead}" if ahead else None


def _directive(name: str, value: SbatchValue | int | None) -> str:
    """`--name=value` as sbatch reads it again: quotes and backslashes are its own, not the shell's."""
    if value is True:
        return f"--{name}"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return f"--{name}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'


def no_pattern(path: str) -> str:
    """A path in which Slurm replaces nothing."""
    return path.replace("%", "%%")
