"""Why a start has failed, looked for on its host: the part of doctor that the failure's words point at."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata

from dynctl.cli.doctor_view import lines
from dynctl.cli.pick import home, state
from dynctl.cli.render import paint, program
from dynctl.deploy.home import RunDir
from dynctl.deploy.plan import Plan
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import Diagnosis
from dynctl.doctor.checks import REACH
from dynctl.doctor.findings import Finding
from dynctl.doctor.hints import topics_of
from dynctl.doctor.runners import LocalRunner, is_here
from dynctl.doctor.service import Way, examine
from dynctl.doctor.subject import Wanted
from dynctl.errors import CodecError, DynctlError, UsageError
from dynctl.protocol.deployment import DeploymentView
from dynctl.recipe.load import load_recipe
from dynctl.recipe.override import VARIABLE
from dynctl.topology.inventory import Host

DEADLINE_S = 3.0
_STARTING = ("failed", "backoff", "starting", "lost")


def causes(run: RunDir, seen: DeploymentView, found: Diagnosis) -> list[Finding]:
    """What may explain a start that failed, on the host of the process that did; [] = nothing to look for.

    Takes 3 s at most. Only this machine is looked at; a run whose plan or recipe cannot be read any more, or
    that failed elsewhere, gives [] too.
    """
    row = next((row for row in seen.processes if row.id == found.seat), None)
    if not found.layer or (row is not None and row.state not in _STARTING):
        return []
    said = [found.reason, found.error, *(row.last_error if row else ())]
    topics = topics_of(kind_of(run, found.seat), "\n".join(said))
    if not topics:
        return []
    try:
        plan = Plan.from_json(run.plan.read_bytes())
        environ = {name: value for name, value in os.environ.items() if name != VARIABLE}
        loaded = load_recipe(run.lock, environ=environ, files_here=False)
    except (OSError, CodecError, DynctlError):
        return []
    hosts = [Host(n.name, n.address) for n in plan.nodes if row is None or n.name == row.node]
    if not is_here(hosts):
        return []
    wanted = Wanted(
        version=metadata.version("dynctl"),
        home=str(home().root),
        loaded=loaded,
        plan=plan,
        tried=tried(plan, seen, found.seat),
    )
    way = Way(LocalRunner(), sys.executable, (sys.executable,), DEADLINE_S)
    report = asyncio.run(examine(hosts, wanted, way, (*topics, REACH)))
    order = {topic: rank for rank, topic in enumerate((REACH, *topics))}
    told = [_late(f) if f.check == REACH else f for f in report.findings if f.level != "note"]
    told = [f for f in told if f.check != REACH or f.level != "ok"]
    return sorted(told, key=lambda finding: order.get(finding.check, len(order)))


def _late(finding: Finding) -> Finding:
    """A host that did not answer in so short a time is not why the start failed."""
    return finding if finding.level == "ok" else replace(finding, level="unknown")


def kind_of(run: RunDir, seat: str) -> str:
    """The kind of the failure that a process left, "" = none."""
    try:
        record = state(run).seat(seat)
    except (CodecError, UsageError):
        return ""
    return record.last_kind if record else ""


def tried(plan: Plan, seen: DeploymentView, seat: str) -> frozenset[str]:
    """Whose ports must be free now: those of all that has ended, else of the engine that died."""
    if seen.phase in ENDED:
        return frozenset(process.id for process in plan.processes)
    return frozenset(p.id for p in plan.processes if p.kind == "engine" and seat in p.depends)


def causes_text(run: RunDir, findings: Sequence[Finding]) -> list[str]:
    """The block under a diagnosis; [] when nothing was looked for."""
    if not findings:
        return []
    bad = any(finding.level in ("fail", "warn") for finding in findings)
    head = "what may be behind it, as the host is now:" if bad else "what may be behind it is well now:"
    return ["", paint(head, "dim"), *lines(findings), f"all checks: {program()} doctor {run.lock}"]
