"""The command line of a step: which job, which node of it, beside what else runs there.

Steps overlap (`--overlap`) and are not `--exact`. Slurm gives an exact step CPUs and GPUs of its own choice:
with the one CPU for each node that a job gets unless told, the second one on a node waits until the first has
ended, as would a worker for the one before it that still exits; and its GPUs would not be those of the plan,
which a replica's ranks go by. `--gres=gpu:N` with `--overlap` is no way either: all steps get the same first
N. So a step is given all that the job has on the node, and its engine, by CUDA_VISIBLE_DEVICES, the GPUs of
the plan out of those (`worker.step`).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynctl.errors import LaunchError
from dynctl.launchers.base import Launch, RunRef
from dynctl.launchers.last_lines import tail, telling_lines

_LINES = 20
_EVERY_STEP = (
    "--mem=0",
    "--cpu-bind=none",
    "--kill-on-bad-exit=0",
    "--wait=0",
    "--input=none",
    "--unbuffered",
    "--quiet",
    "--export=ALL",
)
"""All memory of the job on the node, no CPU apart, the environment as it is, output as it comes."""
_OF_THE_BATCH = (
    "SLURM_MEM_PER_",
    "SLURM_NTASKS",
    "SLURM_NPROCS",
    "SLURM_TASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_CPU_BIND",
    "SLURM_MEM_BIND",
    "SLURM_TRES_PER_TASK",
    "SLURM_GPUS",
    "SLURM_EXPORT_ENV",
    "SLURM_DISTRIBUTION",
    "SRUN_",
)
"""Variables of the batch script that `srun` would take for options of the step."""
_OF_NO_JOB = ("SLURM_CONF", "SLURM_WORKING_CLUSTER")
"""What `srun` needs for a step in another job than its own."""


@dataclass(frozen=True, slots=True)
class JobSite:
    """The job this process runs in, and the follow-up jobs that stand by it.

    `groups`: node → its part of a job of several parts, `part_ids` the ids of all parts, each with steps of
    its own. `others`: node → id of the follow-up job that has it.
    """

    job_id: str
    groups: Mapping[str, int] = field(default_factory=dict)
    part_ids: tuple[str, ...] = ()
    others: Mapping[str, str] = field(default_factory=dict)

    @property
    def jobs(self) -> str:
        """The ids of all that have steps, as Slurm's programs take them."""
        return ",".join(dict.fromkeys((*(self.part_ids or (self.job_id,)), *self.others.values())))

    def way_to(self, node: str) -> tuple[str, ...]:
        """Options by which `srun` here reaches a node."""
        if node in self.others:
            return (f"--jobid={self.others[node]}",)
        return (f"--het-group={self.groups[node]}",) if node in self.groups else ()

    def withheld(self, node: str) -> frozenset[str]:
        """Variables of our own environment that `srun` for a node must not see."""
        if node in self.others:
            return of_our_job()
        return frozenset(k for k in os.environ if k.startswith(_OF_THE_BATCH))


def of_our_job() -> frozenset[str]:
    """Variables of the job we may be in, of which an `srun` for another job must not see any."""
    ours = ("SLURM_", "SRUN_")
    return frozenset(k for k in os.environ if k.startswith(ours) and k not in _OF_NO_JOB)


def step_name(seat: str, incarnation: int) -> str:
    """By which the step is found again."""
    return f"{seat}.i{incarnation}"


def step_argv(site: JobSite, launch: Launch, run: RunRef) -> tuple[str, ...]:
    """`srun` for one process, beside whatever else runs on the node, with all the job has there."""
    return (
        "srun",
        *site.way_to(launch.node),
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={launch.node}",
        f"--job-name={step_name(launch.process_id, launch.incarnation)}",
        *_EVERY_STEP,
        f"--chdir={launch.command.cwd or run.run_dir}",
        *launch.command.argv,
    )


def run_on(site: JobSite, nodes: Sequence[str], argv: Sequence[str], log: Path, within_s: float) -> None:
    """Run a command once on each of these nodes, to its end. Raises LaunchError with what it said last."""
    for way in sorted({site.way_to(node) for node in nodes}):
        chosen = [node for node in nodes if site.way_to(node) == way]
        step = (
            "srun",
            *way,
            "--overlap",
            f"--nodes={len(chosen)}",
            f"--ntasks={len(chosen)}",
            "--ntasks-per-node=1",
            f"--nodelist={','.join(chosen)}",
            *_EVERY_STEP,
            "--label",
            *argv,
        )
        withheld = site.withheld(chosen[0])
        environ = {k: v for k, v in os.environ.items() if k not in withheld}
        try:
            with log.open("ab") as output:
                done = subprocess.run(
                    step,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=environ,
                    timeout=within_s,
                    check=False,
                )
        except subprocess.TimeoutExpired as error:
            told = f"{argv[0]} did not end on {' '.join(chosen)} within {within_s:g} s"
            raise LaunchError(told, where=str(log)) from error
        except OSError as error:
            raise LaunchError(f"{step[0]} could not be run: {error.strerror or error}") from error
        if done.returncode:
            said = "\n".join(f"  {line}" for line in telling_lines(tail(log, _LINES), _LINES))
            raise LaunchError(f"it failed on one of {' '.join(chosen)}:\n{said}", where=str(log))
