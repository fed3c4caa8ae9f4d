"""`dynctl status`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dynctl.cli import options
from dynctl.cli.pick import ask, pick
from dynctl.cli.render import STATE_STYLES, data, json_data, paint
from dynctl.deploy.ask import ask_health
from dynctl.deploy.home import RunDir
from dynctl.deploy.logs import tail
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import Diagnosis, diagnose, ready_counts
from dynctl.protocol.deployment import DeploymentView

_LINES = 3

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Stay and show every change; Ctrl-C leaves.")]


def status(name: options.Name = None, watch: Watch = False, as_json: options.Json = False) -> None:
    """Is it ready, and if not, why: the first failing layer and its first error line.

    Layers, in order: the deployment, its controller, its workers, its frontends, the frontend's own health.
    """
    run = pick(name, ended=True)
    if watch and not as_json:
        from dynctl.cli.live import attend

        attend(run)
        return
    seen, silent = ask(run)
    found = look_closer(seen, silent)
    if as_json:
        json_data(as_object(seen, found))
    else:
        data("\n".join(text(run, seen, found)))


def look_closer(seen: DeploymentView, silent: str) -> Diagnosis:
    """What is wrong first; `silent`: why the controller does not answer, "" when it does."""
    if silent:
        return Diagnosis("controller", f"the controller does not answer: {silent}", "controller")
    health = ""
    if seen.phase not in ENDED and any(r.role == "frontend" and r.ready for r in seen.processes):
        health = ask_health(seen.url)
    return diagnose(seen, health)


def as_object(seen: DeploymentView, found: Diagnosis) -> dict[str, Any]:
    """The status for scripts."""
    return {
        "name": seen.name,
        "phase": seen.phase,
        "ready": not found.layer,
        "counts": ready_counts(seen),
        "url": seen.url,
        "run_dir": seen.run_dir,
        "controller_pid": seen.controller_pid,
        "layer": found.layer,
        "reason": found.reason,
        "process": found.seat,
        "error": found.error,
    }


def text(run: RunDir, seen: DeploymentView, found: Diagnosis) -> list[str]:
    """The status for people."""
    phase = paint(seen.phase, STATE_STYLES.get(seen.phase, ""))
    lines = [
        f"{seen.name}  {phase}  {ready_counts(seen)}  {seen.url}",
        f"run: {seen.run_dir}",
    ]
    if not found.layer:
        return [*lines, "all layers are well: controller, workers, frontends, health"]
    lines.append(f"{paint(found.layer, 'error')}: {found.reason}")
    if found.error:
        lines.append(f"  {found.error}")
    elif found.seat:
        lines += [f"  {line}" for line in last_lines(run, found.seat)]
    if found.seat:
        lines.append(f"more: dynctl logs {seen.name} {found.seat}")
    return lines


def last_lines(run: RunDir, seat: str) -> list[str]:
    """What a process or its engine said last: what it is doing now."""
    return tail(run.logs / f"{seat}.engine.log", _LINES) or tail(run.logs / f"{seat}.log", _LINES)
