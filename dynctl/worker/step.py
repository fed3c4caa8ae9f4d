"""An engine started by a sidecar that is itself a step of a Slurm job. Pure.

Slurm's variables would have an engine take itself for part of an MPI start, and the plan's GPU numbers count
from those that the job has on the node, whatever their own numbers are.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping, Sequence

ENV_STEP = "DYNCTL_STEP"
"""Set where processes are steps of a Slurm job."""
ENV_GROUP = "DYNCTL_STEP_GROUP"
"""Which part of a job of several parts this node is in; not set in others."""
ENV_JOB = "DYNCTL_STEP_JOB"
"""The follow-up job that the node is in; not set in the deployment's own."""
_DEVICES = "CUDA_VISIBLE_DEVICES"
_OF_SLURM = ("SLURM_", "SLURMD_", "SRUN_", "PMI_", "PMIX_", "PMI2_")
_OF_THE_JOB = (
    "SLURM_CONF",
    "SLURM_JOB_ID",
    "SLURM_JOBID",
    "SLURM_JOB_NODELIST",
    "SLURM_NODELIST",
    "SLURM_HET_SIZE",
    "SLURM_WORKING_CLUSTER",
)
"""What `srun` needs to find its job; from the others it would take options."""


def engine_environment(
    argv: Sequence[str], given: Mapping[str, str], own: Mapping[str, str]
) -> dict[str, str]:
    """All variables of the engine: ours, and what is given for it."""
    if ENV_STEP not in own:
        return {**own, **given}
    kept: tuple[str, ...] = ("SLURM_CONF",)
    if _is_step(argv):
        # Started from outside its job, a step of one node is told of that node alone.
        kept = ("SLURM_CONF", "SLURM_WORKING_CLUSTER") if own.get(ENV_JOB) else _OF_THE_JOB
    ours = {k: v for k, v in own.items() if k.startswith(kept) or not k.startswith(_OF_SLURM)}
    devices = {_DEVICES: _renumbered(given[_DEVICES], own.get(_DEVICES, ""))} if _DEVICES in given else {}
    return {**ours, **given, **devices}


def engine_argv(argv: Sequence[str], own: Mapping[str, str]) -> list[str]:
    """The engine's command, GPUs by the numbers they have here, the step in this part of the job."""
    if ENV_STEP not in own:
        return list(argv)
    mark, visible = f"{_DEVICES}=", own.get(_DEVICES, "")
    made = [mark + _renumbered(a.removeprefix(mark), visible) if a.startswith(mark) else a for a in argv]
    if _is_step(argv) and own.get(ENV_GROUP):
        made.insert(1, f"--het-group={own[ENV_GROUP]}")
    if _is_step(argv) and own.get(ENV_JOB):
        made.insert(1, f"--jobid={own[ENV_JOB]}")
    return made


def _is_step(argv: Sequence[str]) -> bool:
    return os.path.basename(argv[0]) == "srun"


def _renumbered(planned: str, visible: str) -> str:
    """Each planned number n as the n-th of what is visible; as planned where that cannot be."""
    there = [device for device in visible.split(",") if device]
    wanted = planned.split(",")
    if not all(n.isdigit() and int(n) < len(there) for n in wanted):
        return planned
    return ",".join(there[int(n)] for n in wanted)
