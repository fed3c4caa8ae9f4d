"""The process of an agent: what it is told on the command line, until it is told to leave."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from dynctl.agent.service import Agent, run_ref
from dynctl.errors import DynctlError
from dynctl.http.runtime import run as run_loop
from dynctl.launchers.local import LocalLauncher
from dynctl.observability.logs import setup
from dynctl.transport.keys import Keys

logger = logging.getLogger("dynctl.agent")


def main() -> int:
    """Serve until told to leave; the exit code."""
    parser = argparse.ArgumentParser(prog="dynctl.agent")
    for name in ("--run-dir", "--run-id", "--node", "--endpoint"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    setup(f"agent-{args.node}")
    try:
        run_loop(serve(args))
    except DynctlError as error:
        logger.error("agent.failed %s", error)
        return 1
    return 0


async def serve(args: argparse.Namespace) -> None:
    """Serve one run on this node."""
    run = run_ref(args.run_id, args.run_dir)
    agent = Agent(Keys.load(run.run_dir / "keys.json"), args.endpoint, LocalLauncher(), run, args.node)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, agent.leave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    await agent.serve()
