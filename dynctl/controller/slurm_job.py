"""`python -m dynctl.controller.slurm_job --run-dir DIR`: a deployment inside its job, run by its script.

Plans the recipe of the run on the nodes that the job was given, then is its controller. Ends with the
deployment, and the job ends with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

import msgspec

from dynctl.controller.__main__ import leave_word, only_one, serve
from dynctl.controller.moving import nodes_of
from dynctl.controller.service import run_dir_of
from dynctl.controller.slurm_follow_jobs import Ways
from dynctl.controller.slurm_follow_up import SlurmFollowUps
from dynctl.deploy.amend import hosts_of, read_plan
from dynctl.deploy.disk import disk
from dynctl.deploy.home import RunDir
from dynctl.deploy.run import INVENTORY
from dynctl.deploy.slurm_inventory import Allocation, allocation
from dynctl.deploy.slurm_up import plan_in_job
from dynctl.deploy.state import ENDED, RunState, drain_of, load_state
from dynctl.errors import DynctlError, LaunchError
from dynctl.http.runtime import run as run_loop
from dynctl.launchers.base import RunRef
from dynctl.launchers.files import write_atomic
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_fleet import SlurmFleet
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.launchers.slurm_job import ABANDONED, JobRecord
from dynctl.launchers.slurm_step import JobSite, run_on
from dynctl.observability.logs import setup

logger = logging.getLogger("dynctl.controller")

STAGE_S = 7200.0
"""For the largest model over a slow network."""


def main() -> int:
    """Run until the deployment is ended; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.controller.slurm_job")
    parser.add_argument("--run-dir", required=True)
    setup("controller")
    run = run_dir_of(parser.parse_args().run_dir)
    try:
        lock = only_one(run)
        try:
            return begin(run, os.environ)
        finally:
            os.close(lock)
    except DynctlError as error:
        logger.error("controller.failed %s", error)
        leave_word(run, 1, error.kind, str(error))
        return 1
    except Exception as error:
        # The top of the process: whoever waits for this deployment must learn why it has no controller.
        logger.exception("controller.broke")
        leave_word(run, 1, DynctlError.kind, f"{type(error).__name__}: {error}")
        return 1


def begin(run: RunDir, environ: Mapping[str, str]) -> int:
    """Plan on what the job has got, and look after it. Raises DynctlError."""
    if (run.path / ABANDONED).exists():
        logger.warning("job.abandoned: whoever submitted it has given it up")
        return 0
    client = SlurmClient(environ)
    given = allocation(environ, client)
    hosts = " ".join(f"{host.name}={host.gpus}" for host in given.inventory.hosts)
    logger.info("job.started id=%s nodes_and_gpus=%s", given.site.job_id, hosts)
    state = load_state(run.state)
    if state is None:
        raise LaunchError("the run has no state", where=str(run.state))
    if state.phase in ENDED:
        logger.info("controller.unneeded phase=%s", state.phase)
        return 0
    remember(run, given)
    incarnation = state.controller.incarnation + 1
    if not state.registry:
        stager = partial(stage_on, given.site, run=run)
        state = plan_in_job(run, given, environ, stager)
    follow_ups = load_follow_ups(run.path)
    site = replace(given.site, others={node: one.job.job_id for one in follow_ups for node in one.nodes})
    own = frozenset(host.name for host in given.inventory.hosts)
    fleet = SlurmFleet(client, site, RunRef(run.run_id, run.path), strays(run, own | site.others.keys()))
    more = SlurmFollowUps(Ways(run, client, fleet, site, own, partial(stage_on, run=run)), follow_ups)
    run_loop(serve(run, incarnation, fleet, endings(state), more))
    after = load_state(run.state)
    return 1 if after is not None and after.phase == "failed" else 0


def stage_on(site: JobSite, source: str, target: str, nodes: Sequence[str], *, run: RunDir) -> None:
    """Copy a model to the disks of these nodes, all at the same time. Raises LaunchError."""
    logger.info("model.staging from=%s to=%s nodes=%s", source, target, " ".join(nodes))
    argv = [sys.executable, "-m", "dynctl.deploy.stage", "--from", source, "--to", target]
    run_on(site, nodes, argv, run.logs / "stage.log", STAGE_S)


def strays(run: RunDir, ours: Collection[str]) -> set[str]:
    """Hosts that the run has known and that are not `ours` now: follow-up jobs that ended under a controller
    that was killed. They are no hosts any more but where something is still. Raises DynctlError.
    """
    plan = read_plan(run)
    known, used = hosts_of(run, plan), nodes_of(plan)
    left = tuple(host for host in known.hosts if host.name in ours or host.name in used)
    if left != known.hosts:
        with disk("the run directory cannot be written"):
            write_atomic(run.path / INVENTORY, msgspec.json.encode(replace(known, hosts=left)))
    return {host.name for host in known.hosts if host.name not in ours}


def remember(run: RunDir, given: Allocation) -> None:
    """Write down which job this is. Raises LaunchError."""
    try:
        JobRecord(job_id=given.site.job_id, name=given.name, submitted_at=time.time()).save(run.path)
    except OSError as error:
        raise LaunchError(
            f"the run directory cannot be written: {error.strerror}", where=str(run.path)
        ) from error


def endings(state: RunState) -> dict[signal.Signals, float]:
    """SIGTERM is the job's end, SIGUSR1 its warning of it: both drain, since nothing outlives a job."""
    drain_s = drain_of(state)
    return {signal.SIGTERM: drain_s, signal.SIGINT: drain_s, signal.SIGUSR1: drain_s}


if __name__ == "__main__":
    sys.exit(main())
