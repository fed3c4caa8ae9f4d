"""`python -m dynctl.controller.slurm_successor --run-dir DIR`: a job that takes over before this one ends.

Started in the job by its keeper. Submits the same recipe as a new run, and when that is ready lets the name
mean it and has the old one drain. Whatever happens, the old one drains before it would be cut off; without a
successor not before it must.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata

from dynctl.controller.service import run_dir_of
from dynctl.deploy.amend import hosts_of, read_plan
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.disk import disk
from dynctl.deploy.events import append_event
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.run import Checked, Site
from dynctl.deploy.slurm_size import assumed, widened
from dynctl.deploy.slurm_up import submit_run
from dynctl.deploy.state import ENDED, drain_of, readable_state
from dynctl.errors import DynctlError, SlurmError, SlurmRejected
from dynctl.launchers.files import write_atomic
from dynctl.launchers.local import LocalLauncher
from dynctl.launchers.slurm_client import SlurmClient
from dynctl.launchers.slurm_follow import load_follow_ups
from dynctl.launchers.slurm_job import REFUSED, SUCCESSOR, JobLauncher, JobTable, load_record
from dynctl.observability.logs import setup
from dynctl.protocol.deployment import DownCall, DownReply
from dynctl.recipe.load import LoadedRecipe, load_recipe
from dynctl.recipe.override import VARIABLE
from dynctl.recipe.slurm import Slurm

logger = logging.getLogger("dynctl.controller")

AGAIN_S, AGAIN_MOST_S = 15.0, 300.0
"""After a successor that came to nothing: twice as long each time."""
_LOOK_S = 1.0
_ANSWER_S = 10.0


def main() -> int:
    """Hand over, or drain when it is time and not before; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.controller.slurm_successor")
    parser.add_argument("--run-dir", required=True)
    setup("controller")
    run = run_dir_of(parser.parse_args().run_dir)
    code, begun, client = 0, time.time(), SlurmClient()
    ends = serves_until(run, Slurm(), client, begun)
    try:
        loaded = load_recipe(run.lock, environ={k: v for k, v in os.environ.items() if k != VARIABLE})
        ends = serves_until(run, loaded.recipe.slurm or Slurm(), client, begun)
        hand_over(Handover(run, loaded, os.environ, client, ends))
    except DynctlError as error:
        logger.error("successor.failed %s", error)
        code = 1
    except Exception:
        # The top of the process: the old job must drain in time all the same.
        logger.exception("successor.broke")
        code = 1
    if code:
        pause(run, ends)
    drain(run)
    return code


@dataclass(frozen=True, slots=True)
class Handover:
    """What is handed over: a run by its recipe, until `ends` (Unix time), when it must drain."""

    run: RunDir
    loaded: LoadedRecipe
    environ: Mapping[str, str]
    client: SlurmClient
    ends: float

    @property
    def home(self) -> Home:
        """Where names are kept."""
        return Home(self.run.path.parent.parent)


def serves_until(run: RunDir, options: Slurm, client: SlurmClient, now: float) -> float:
    """When this job must drain (Unix time); by the warning it was given when Slurm does not say its end."""
    try:
        left_s = seconds_left(run, client)
    except SlurmError as error:
        logger.warning("successor.end_unknown error=%s", error)
        left_s = 0.0
    return now + max(0.0, (left_s or options.resubmit) - options.warning)


def hand_over(work: Handover) -> None:
    """Return when a successor is ready and has the name, or when the time is up.

    One that Slurm refuses, or that ends before it is ready, is submitted again after longer and longer. This
    job serves on meanwhile.
    """
    run, again_s = work.run, AGAIN_S
    while time.time() < work.ends and not _over(run):
        try:
            made = submitted(work)
        except DynctlError as error:
            why = str(error)
        else:
            (run.path / REFUSED).unlink(missing_ok=True)
            why = attended(work, made)
            if not why:
                return
        _refused(run, why)
        pause(run, min(work.ends, time.time() + again_s))
        again_s = min(2 * again_s, AGAIN_MOST_S)


def submitted(work: Handover) -> RunDir:
    """The successor's run, its job submitted. Raises DynctlError."""
    run, environ = work.run, work.environ
    site = Site(work.home, LocalLauncher(), environ, sys.executable, metadata.version("dynctl"))
    plan = read_plan(run)
    loaded = widened(work.loaded, hosts_of(run, plan))
    checked = Checked(loaded, assumed(loaded), ())
    try:
        # On nodes of its own: both have the frontend's port, and the old one's GPUs are not free.
        given = [node for one in load_follow_ups(run.path) for node in one.nodes]
        avoid = ",".join(filter(None, (environ.get("SLURM_JOB_NODELIST", ""), *given)))
        made = submit_run(checked, site, work.client, avoid=avoid)
    except SlurmRejected as error:
        logger.warning("successor.shares_nodes error=%s", error)
        made = submit_run(checked, site, work.client)
    with disk("the successor cannot be written down"):
        write_atomic(run.path / SUCCESSOR, made.run_id)
    append_event(run.events, time.time(), "successor.submitted", run=made.run_id)
    return made


def attended(work: Handover, made: RunDir) -> str:
    """Wait for the successor, give it the name; "" when that is done, else why there is none."""
    run, name = work.run, work.loaded.recipe.name
    record = load_record(made.path)
    assert record is not None
    job = JobLauncher(JobTable(work.client, [record]), record, made.path)
    while time.time() < work.ends and not _over(run):
        state = readable_state(made.state)
        if state is not None and state.phase == "ready":
            work.home.point(name, made)
            append_event(run.events, time.time(), "successor.ready", run=made.run_id, url=state.url)
            return ""
        if job.over():
            said = f": {state.reason}" if state is not None and state.reason else ""
            return f"{made.run_id} has ended before it was ready{said}"
        time.sleep(_LOOK_S)
    if _over(run):
        job.kill(job.owned(made.run_id))  # the deployment was ended by its user
        return ""
    # It may still be pending: it takes the name as soon as it begins, since this one has an end.
    work.home.point(name, made)
    return ""


def pause(run: RunDir, until: float) -> None:
    """Until then, or until the deployment ends."""
    while time.time() < until and not _over(run):
        time.sleep(min(_LOOK_S, max(0.0, until - time.time())))


def _refused(run: RunDir, why: str) -> None:
    """Say once in the events, and to `status` for as long as it lasts, why there is no successor."""
    logger.error("successor.refused %s", why)
    path = run.path / REFUSED
    try:
        if not path.exists() or path.read_text() != why:
            write_atomic(path, why)
            append_event(run.events, time.time(), "successor.refused", message=why)
    except OSError as error:
        logger.error("run.unwritable error=%s", error)


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
