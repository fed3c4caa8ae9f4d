"""The `srun` that looks at nodes as a deployment's job would get them, and what it prints, by node. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynctl.deploy.slurm_script import nodes_wanted, slurm_time
from dynctl.deploy.slurm_size import Part
from dynctl.recipe.load import LoadedRecipe
from dynctl.recipe.slurm import Slurm

_OF_A_BATCH = frozenset(
    {
        *("begin", "dependency", "requeue", "no-requeue", "wait", "get-user-env", "export-file", "batch"),
        *("ignore-pbs", "test-only", "open-mode", "no-kill"),
    }
)
"""Options of sbatch that srun has not, or that are about when and how a deployment's own job runs."""
_NAMED = 'echo "@$SLURMD_NODENAME"; echo "@$SLURMD_NODENAME" >&2'
_AS_A_LOGIN = "unset CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ZE_AFFINITY_MASK"
"""Slurm sets these for a step, and a start replaces them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """For Slurm to give nodes, and for what is run there; the second ends the job, too."""

    wait_s: float
    run_s: float


def look_argv(
    loaded: LoadedRecipe, part: Part, name: str, limits: Limits, argv: Sequence[str]
) -> tuple[str, ...]:
    """Run `argv` once on each of as many of the part's nodes as can be had in time; all get its input."""
    options = loaded.recipe.slurm or Slurm()
    nodes = part.size.nodes
    given = {
        **nodes_wanted(loaded, part),
        **{key: value for key, value in options.sbatch_args.items() if key not in _OF_A_BATCH},
        "job-name": name,
        "nodes": f"1-{nodes}" if nodes > 1 else 1,
        "ntasks-per-node": None,
        "time": slurm_time(limits.wait_s + limits.run_s),
        "immediate": max(1, round(limits.wait_s)),
    }
    words = [
        f"--{key}" if value is True else f"--{key}={value}"
        for key, value in given.items()
        if value not in (None, "", False)
    ]
    how = ("--label", "--quiet", "--wait=0", "--kill-on-bad-exit=0", "--cpu-bind=none", "--export=ALL")
    return ("srun", *words, *how, "sh", "-c", f'{_NAMED}; {_AS_A_LOGIN}; exec "$@"', "look", *argv)


def by_node(output: bytes) -> dict[str, bytes]:
    """What each node wrote, line ends left out: long lines come in pieces, each with the task's label."""
    pieces: dict[bytes, list[bytes]] = {}
    for line in output.split(b"\n"):
        label, colon, rest = line.partition(b": ")
        if colon and label.strip().isdigit():
            pieces.setdefault(label.strip(), []).append(rest)
    return {
        first.removeprefix(b"@").decode(errors="replace"): b"".join(rest)
        for first, *rest in pieces.values()
        if first.startswith(b"@")
    }
