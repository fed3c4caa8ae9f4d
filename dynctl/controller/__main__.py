"""`python -m dynctl.controller --run-dir DIR`: the controller of one run, started by `dynctl up`."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from collections.abc import Mapping
from functools import partial

from dynctl import procfs
from dynctl.controller.moving import More, NoMore
from dynctl.controller.service import Controller, Parts, run_dir_of
from dynctl.deploy.gpus import hold
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.state import ENDED, ControllerRecord, load_state
from dynctl.errors import DynctlError, LaunchError, UsageError
from dynctl.http.runtime import run as run_loop
from dynctl.launchers.agents import AgentFleet
from dynctl.launchers.base import ENV_INCARNATION, RunRef
from dynctl.launchers.fleet import Fleet, LocalFleet
from dynctl.launchers.local import LocalLauncher
from dynctl.observability.logs import setup
from dynctl.protocol.exits import LastWords
from dynctl.transport.keys import Keys

logger = logging.getLogger("dynctl.controller")

PROCESS_ID = "controller"


def main() -> int:
    """Run until the deployment is ended; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.controller")
    parser.add_argument("--run-dir", required=True)
    setup(PROCESS_ID)
    run = run_dir_of(parser.parse_args().run_dir)
    incarnation = int(os.environ.get(ENV_INCARNATION, "1"))
    try:
        lock = only_one(run)
        try:
            run_loop(serve(run, incarnation))
        finally:
            os.close(lock)
    except DynctlError as error:
        logger.error("controller.failed %s", error)
        leave_word(run, incarnation, error.kind, str(error))
        return 1
    except Exception as error:
        # The top of the process: whoever waits for this deployment must learn why it has no controller.
        logger.exception("controller.broke")
        leave_word(run, incarnation, DynctlError.kind, f"{type(error).__name__}: {error}")
        return 1
    return 0


def only_one(run: RunDir) -> int:
    """Hold the run against any other controller; the lock's descriptor. Raises LaunchError, UsageError."""
    try:
        fd = os.open(run.path / "controller.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LaunchError(
            f"the run directory cannot be used: {error.strerror}", where=str(run.path)
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise UsageError("another controller looks after this run", where=str(run.path)) from error
    return fd


async def serve(
    run: RunDir,
    incarnation: int,
    fleet: Fleet | None = None,
    endings: Mapping[signal.Signals, float] | None = None,
    more: More | None = None,
) -> None:
    """Read the run and look after it. `fleet` None: as the plan says (`fleet_of`). `more`: a way to nodes
    beyond the plan's.

    SIGTERM and SIGINT have it leave what runs to another controller. `endings`: signals that have it end the
    deployment instead, each with the seconds that requests have to end.
    """
    state = load_state(run.state)
    if state is None:
        raise LaunchError("the run has no state", where=str(run.state))
    if state.phase in ENDED:
        logger.info("controller.unneeded phase=%s", state.phase)
        return
    own = procfs.stat(os.getpid())
    state.controller = ControllerRecord(
        pid=os.getpid(), start_ticks=own.start_ticks if own else 0, incarnation=incarnation
    )
    plan = Plan.from_json(run.plan.read_bytes())
    keys = Keys.load(run.keys)
    controller = Controller(
        Parts(run, plan, keys, fleet or fleet_of(plan, run, keys), more or NoMore()), state
    )
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, controller.leave)
    for signum, drain_s in (endings or {}).items():
        loop.add_signal_handler(signum, controller.end, drain_s, signum.name)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    await controller.run()


def fleet_of(plan: Plan, run: RunDir, keys: Keys) -> Fleet:
    """How processes of this plan are started: by the nodes' agents where there are any."""
    agents = {node.name: node.agent for node in plan.nodes if node.agent}
    if agents:
        return AgentFleet(keys, agents, plan.process(PROCESS_ID).node, run.logs)
    claim = partial(hold, Home.holding(run.path), run.path, run.run_id)
    return LocalFleet(LocalLauncher(), RunRef(run.run_id, run.path), claim)


def leave_word(run: RunDir, incarnation: int, kind: str, message: str) -> None:
    """Leave last words for `dynctl up`, which waits."""
    words = LastWords(id=PROCESS_ID, incarnation=incarnation, kind=kind, message=message)
    try:
        words.save(run.path)
    except OSError as error:
        logger.error("exits.unwritable error=%s", error)


if __name__ == "__main__":
    sys.exit(main())
