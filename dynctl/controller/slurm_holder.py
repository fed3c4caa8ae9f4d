"""`python -m dynctl.controller.slurm_holder --run-dir DIR`: what the batch script of a follow-up job runs.

Holds the job's nodes, on which the deployment's controller starts what it needs there, for as long as the
deployment's own job lives; starts nothing. Slurm ends it at the job's time limit at the latest.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from dynctl.controller.service import run_dir_of
from dynctl.deploy.home import RunDir
from dynctl.deploy.state import ENDED, load_state
from dynctl.errors import CodecError, DynctlError
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_job import JobLauncher, JobTable, load_record
from dynctl.observability.logs import setup

logger = logging.getLogger("dynctl.controller")

LOOK_S = 5.0


def main() -> int:
    """Until the deployment, or its own job, has ended; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.controller.slurm_holder")
    parser.add_argument("--run-dir", required=True)
    setup("holder")
    run = run_dir_of(parser.parse_args().run_dir)
    try:
        record = load_record(run.path)
        if record is None:
            logger.error("holder.unneeded: there is no deployment in %s", run.path)
            return 1
        job = JobLauncher(JobTable(SlurmClient(), [record]), record, run.path)
        while not (_ended(run) or job.over()):
            time.sleep(LOOK_S)
    except DynctlError as error:
        logger.error("holder.failed %s", error)
        return 1
    logger.info("holder.done: the deployment has ended")
    return 0


def _ended(run: RunDir) -> bool:
    """Whether the deployment says so, or its directory has been removed."""
    try:
        state = load_state(run.state)
    except CodecError as error:
        logger.warning("holder.unsure error=%s", error)  # a disk that hangs for a moment ends nothing
        return False
    return state is None or state.phase in ENDED


if __name__ == "__main__":
    sys.exit(main())
