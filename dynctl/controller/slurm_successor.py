"""`python -m dynctl.controller.slurm_successor --run-dir DIR`: a job that takes over before this one ends.

Started in the job by its keeper. Submits the same recipe as a new run, and when that is ready lets the name
mean it and has the old one drain. Whatever happens, the old one drains before it would be cut off.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata

from dynctl.controller.service import run_dir_of
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.disk import disk
from dynctl.deploy.events import append_event
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.run import Checked, Site
from dynctl.deploy.slurm_size import assumed
from dynctl.deploy.slurm_up import submit_run
from dynctl.deploy.state import ENDED, drain_of, readable_state
from dynctl.errors import DynctlError, SlurmRejected
from dynctl.launchers.files import write_atomic
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_job import SUCCESSOR, JobLauncher, JobTable, load_record
from dynctl.observability.logs import setup
from dynctl.protocol.deployment import DownCall, DownReply
from dynctl.recipe.load import load_recipe
from dynctl.recipe.override import VARIABLE
from dynctl.recipe.slurm import Slurm

logger = logging.getLogger("dynctl.controller")

_LOOK_S = 1.0
_ANSWER_S = 10.0


def main() -> int:
    """Hand over, or drain when it is time; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.controller.slurm_successor")
    parser.add_argument("--run-dir", required=True)
    setup("controller")
    run = run_dir_of(parser.parse_args().run_dir)
    code = 0
    try:
        hand_over(run, os.environ)
    except DynctlError as error:
        logger.error("successor.failed %s", error)
        code = 1
    except Exception:
        # The top of the process: the old job must drain in time all the same.
        logger.exception("successor.broke")
        code = 1
    drain(run)
    return code


def hand_over(run: RunDir, environ: Mapping[str, str]) -> None:
    """Return when the successor is ready and has the name, or when the time is up. Raises DynctlError."""
    loaded = load_recipe(run.lock, environ={k: v for k, v in environ.items() if k != VARIABLE})
    options = loaded.recipe.slurm or Slurm()
    client = SlurmClient(environ)
    ends = time.time() + max(0.0, seconds_left(run, client) - options.warning)
    home = Home(run.path.parent.parent)
    site = Site(home, LocalLauncher(), environ, sys.executable, metadata.version("dynctl"))
    checked = Checked(loaded, assumed(loaded), ())
    try:
        # On nodes of its own: both have the frontend's port, and the old one's GPUs are not free.
        made = submit_run(checked, site, client, avoid=environ.get("SLURM_JOB_NODELIST", ""))
    except SlurmRejected as error:
        logger.warning("successor.shares_nodes error=%s", error)
        made = submit_run(checked, site, client)
    with disk("the successor cannot be written down"):
        write_atomic(run.path / SUCCESSOR, made.run_id)
    append_event(run.events, time.time(), "successor.submitted", run=made.run_id)
    record = load_record(made.path)
    assert record is not None
    job = JobLauncher(JobTable(client, [record]), record, made.path)
    while time.time() < ends and not _over(run):
        state = readable_state(made.state)
        if state is not None and state.phase == "ready":
            home.point(loaded.recipe.name, made)
            append_event(run.events, time.time(), "successor.ready", run=made.run_id, url=state.url)
            return
        if job.over():
            logger.error("successor.ended run=%s", made.run_id)
            break
        time.sleep(_LOOK_S)
    if _over(run):
        job.kill(job.owned(made.run_id))  # the deployment was ended by its user
        return
    # It may still be pending: it takes the name as soon as it begins, since this one has an end.
    time.sleep(max(0.0, ends - time.time()))
    home.point(loaded.recipe.name, made)


def seconds_left(run: RunDir, client: SlurmClient) -> float:
    """Until Slurm ends this job; 0 when it does not say. Raises SlurmError."""
    record = load_record(run.path)
    row = JobTable(client, [record]).row(record) if record is not None else None
    try:
        return datetime.fromisoformat(row.end).timestamp() - time.time() if row is not None else 0.0
    except ValueError:
        return 0.0


def _over(run: RunDir) -> bool:
    state = readable_state(run.state)
    return state is None or state.phase == "stopping" or state.phase in ENDED


def drain(run: RunDir) -> None:
    """Have the deployment of this job end as `dynctl down` does."""
    state = readable_state(run.state)
    if state is None or state.phase in ENDED:
        return
    try:
        call = DownCall(drain_s=drain_of(state))
        ask_controller(run, state.registry, "controller.down", call, DownReply, deadline_s=_ANSWER_S)
    except DynctlError as error:
        logger.error("successor.drain_failed %s", error)


if __name__ == "__main__":
    sys.exit(main())
