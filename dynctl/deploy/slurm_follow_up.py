"""The batch script of a follow-up job: nodes like those of a deployment's own job, as long as that. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import replace

from dynctl.deploy.slurm_script import JobContext, directives, no_pattern
from dynctl.deploy.slurm_size import Part, Size, kinds_of
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.slurm import Slurm

LOG = "follow-up.log"
_OF_THE_FIRST = ("begin", "dependency", "requeue", "no-requeue")
"""Options of sbatch that are about when the deployment's own job starts."""


def follow_up_script(
    loaded: LoadedRecipe, context: JobContext, part: int, size: Size, avoid: Collection[str], left_s: float
) -> str:
    """A job of this size, of nodes as this part of the deployment's job has them, on others than `avoid`.

    `left_s`: what is left of the job's time, 0 = it has no end. The script holds the nodes and starts
    nothing. Raises RecipeError when the time left is not worth a job.
    """
    role, wanted = kinds_of(loaded)[part]
    options = loaded.recipe.slurm or Slurm()
    args = {name: value for name, value in options.sbatch_args.items() if name not in _OF_THE_FIRST}
    own = options.model_copy(update={"time": left_s or options.time, "sbatch_args": args})
    excluded = ",".join(filter(None, (wanted.exclude, *sorted(avoid))))
    where = wanted.model_copy(update={"exclude": excluded, "nodelist": ""})
    lines = directives(
        replace(loaded, recipe=loaded.recipe.model_copy(update={"slurm": own})),
        Part(role, size, where),
        context,
        first=False,
    )
    log = f"{no_pattern(context.run_dir)}/logs/{LOG}"
    run, python = shlex.quote(context.run_dir), shlex.quote(context.python)
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in (*lines, f"--output={log}", "--open-mode=append")),
            f"cd {run} || exit 1",
            'echo "$(date -u +%FT%TZ) job $SLURM_JOB_ID holds $SLURM_JOB_NODELIST"',
            f"exec {python} -u -m dynctl.controller.slurm_holder --run-dir {run}",
            "",
        ]
    )
