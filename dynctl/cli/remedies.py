"""What helps when nobody, or nobody who answers, looks after a deployment: the command, where it works."""

from __future__ import annotations

import os

from dynctl.cli.pick import ENV_NAME, launcher_of, state
from dynctl.cli.render import program
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import Diagnosis
from dynctl.errors import CodecError
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.deployment import DeploymentView

_SAME = "with the same recipe and inventory, from where it was started,"


def new_controller(run: RunDir) -> str:
    """How a deployment without a controller gets one. Raises CodecError, UsageError."""
    if isinstance(launcher_of(run), JobLauncher):
        name = state(run).name
        return f"{program()} down {name} ends what is left of it, {program()} up RECIPE submits it anew"
    # The lock is a file of this machine, which may be another one than that of who asks.
    again = _SAME if by_ssh(run) else str(run.lock)
    return f"{program()} up {again} starts a new one"


def remedy(run: RunDir, seen: DeploymentView, found: Diagnosis) -> str:
    """What to do about it; "" when there is nothing that is always right. Raises CodecError, UsageError."""
    silent = {row.id for row in seen.processes if row.node in seen.unseen}
    if found.layer == "node" or (found.layer in ("worker", "frontend") and found.seat in silent):
        return f"{program()} up {_SAME} starts its agent anew" if by_ssh(run) else ""
    if found.layer != "controller" or seen.phase in ENDED or seen.phase == "starting":
        return ""
    return answering_controller(run, seen) if seen.controller_pid else new_controller(run)


def answering_controller(run: RunDir, seen: DeploymentView) -> str:
    """How one that lives and does not answer is replaced. Raises CodecError, SlurmError, UsageError."""
    launcher, head = launcher_of(run), state(run).head
    kill = f"kill -9 {seen.controller_pid}"
    if isinstance(launcher, JobLauncher):
        at = f" --nodelist={head}" if head else ""
        job = launcher.record.job_id
        return f"srun --jobid={job} --overlap --nodes=1 --ntasks=1{at} {kill}: another one takes over"
    return f"{kill} on {head or 'its host'}, then {new_controller(run)}"


def by_ssh(run: RunDir) -> bool:
    """Whether the hosts of it have agents, which another machine has started."""
    if ENV_NAME in os.environ:
        return True
    try:
        return any(node.agent for node in Plan.from_json(run.plan.read_bytes()).nodes)
    except (OSError, CodecError):
        return False
