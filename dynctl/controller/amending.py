"""Changes that the controller makes to its own deployment, by the calls that the verbs of day 2 make."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata

from dynctl.deploy.amend import apply, read_plan, rescaled
from dynctl.deploy.audit import actor
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.replan import compare
from dynctl.deploy.run import Site
from dynctl.deploy.slurm_grow import without_awaiting
from dynctl.launchers.local import LocalLauncher


def scale(run: RunDir, changes: Mapping[str, int]) -> list[str]:
    """As `dynctl scale` does it, for the planner; which worker changes its role by that, a line each.

    Raises DynctlError. Waits: not for the event loop.
    """
    amended = rescaled(run, dict(changes), _site(run))
    apply(amended, actor("planner", words(changes).split()), ())
    return compare(amended.old, amended.new).handed_over


def give_up(run: RunDir, why: str) -> str:
    """Do without the replicas that wait for a node; what was wanted, in words. Raises, waits as `scale`."""
    plan = read_plan(run)
    left = without_awaiting(plan)
    wanted = words({role: plan.roles[role] for role in left})
    amended = replace(rescaled(run, left, _site(run)), declined=f"{wanted}: {why}; it stays at {words(left)}")
    apply(amended, actor("scale", words(left).split(), force=True), ())
    return wanted


def words(roles: Mapping[str, int]) -> str:
    """As `dynctl scale` takes them."""
    return " ".join(f"{role}={count}" for role, count in roles.items())


def _site(run: RunDir) -> Site:
    return Site(
        Home.holding(run.path), LocalLauncher(), os.environ, sys.executable, metadata.version("dynctl")
    )
