"""`dynctl status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynctl.cli import options
from dynctl.cli.pick import ask, launcher_of, pick
from dynctl.cli.remedies import remedy
from dynctl.cli.render import STATE_STYLES, Style, data, json_data, paint
from dynctl.deploy.ask import Health, ask_health
from dynctl.deploy.home import RunDir
from dynctl.deploy.slurm_view import follow_ups, job_facts, no_successor
from dynctl.deploy.state import ENDED
from dynctl.deploy.status import Diagnosis, diagnose, ready_counts
from dynctl.launchers.last_lines import tail
from dynctl.launchers.slurm_job import JobLauncher
from dynctl.protocol.deployment import DeploymentView

if TYPE_CHECKING:
    from dynctl.doctor.findings import Finding

_LINES = 3

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Stay and show every change; Ctrl-C leaves.")]


def status(name: options.Name = None, watch: Watch = False, as_json: options.Json = False) -> None:
    """Is it ready, and if not, why: the first failing layer and its first error line.

    Layers, in order: the deployment, its controller, its workers, its frontends, the frontends' own health,
    the nodes: one that does not answer the controller may serve on.
    Beside these: what frontends have doubts about, such as an index that is being rebuilt. After a start that
    failed, the part of `dynctl doctor` that may tell why.
    """
    run = pick(name, ended=True)
    if watch and not as_json:
        from dynctl.cli.live import attend

        attend(run)
        return
    seen, silent = ask(run)
    health = ask_frontends(seen)
    found = look_closer(seen, silent, health)
    doubts = doubts_of(health)
    looked = look_for_causes(run, seen, found)
    launcher = launcher_of(run)
    job = job_facts(launcher) if isinstance(launcher, JobLauncher) else None
    more = [job_facts(one) for one in follow_ups(run, launcher)] if isinstance(launcher, JobLauncher) else []
    if as_json:
        told = {**as_object(seen, found, doubts), "remedy": remedy(run, seen, found)}
        told |= {"causes": [asdict(cause) for cause in looked]}
        json_data(told | ({"job": job | {"follow_ups": more}} if job is not None else {}))
        return
    own = [job["line"]] if job is not None else []
    if found.layer == "job" or found.reason in own:  # the same, but for its place in the queue
        found, own = replace(found, reason=(own or [found.reason])[0]), []
    lines = [
        *text(run, seen, found),
        *([f"what helps: {helps}"] if (helps := remedy(run, seen, found)) else []),
    ]
    lines[2:2] = [*own, *(f"follow-up {one['line']}" for one in more)]
    lines += [f"no successor: {why}"] if (why := no_successor(run)) and seen.phase not in ENDED else []
    lines += [f"doubt: {doubt}" for doubt in doubts]
    if looked:
        from dynctl.cli.causes import causes_text

        lines += causes_text(run, looked)
    data("\n".join(lines))


def look_for_causes(run: RunDir, seen: DeploymentView, found: Diagnosis) -> Sequence[Finding]:
    """What on the host may be why a start failed; at once () when all is well."""
    if found.layer not in ("deployment", "worker", "frontend") or not found.seat:
        return ()
    # All of doctor's, with recipes and plans: not loaded where it is not asked.
    from dynctl.cli.causes import causes

    return causes(run, seen, found)


def ask_frontends(seen: DeploymentView) -> dict[str, Health]:
    """What each frontend that lives says of itself, by its id."""
    rows = [row for row in seen.processes if row.role == "frontend" and row.ready and row.pid]
    return {row.id: ask_health(row.url) for row in rows} if seen.phase not in ENDED else {}


def look_closer(seen: DeploymentView, silent: str, health: Mapping[str, Health]) -> Diagnosis:
    """What is wrong first; `silent`: why the controller does not answer, "" when it does."""
    if silent:
        return Diagnosis("controller", f"the controller does not answer: {silent}", "controller")
    return diagnose(seen, {seat: said.reason for seat, said in health.items()})


def doubts_of(health: Mapping[str, Health]) -> list[str]:
    """Each doubt once, with whose it is."""
    whose: dict[str, list[str]] = {}
    for seat, said in health.items():
        for doubt in said.doubts:
            whose.setdefault(doubt, []).append(seat)
    return [f"{doubt} ({', '.join(seats)})" for doubt, seats in whose.items()]


def as_object(seen: DeploymentView, found: Diagnosis, doubts: Sequence[str]) -> dict[str, Any]:
    """The status for scripts."""
    return {
        "name": seen.name,
        "phase": seen.phase,
        "ready": found.ready,
        "counts": ready_counts(seen),
        "url": seen.url,
        "run_dir": seen.run_dir,
        "controller_pid": seen.controller_pid,
        "layer": found.layer,
        "reason": found.reason,
        "process": found.seat,
        "error": found.error,
        "doubts": list(doubts),
        "changing": seen.changing,
        "locked": seen.locked,
        "planner": seen.planner,
        "declined": seen.declined,
    }


def text(run: RunDir, seen: DeploymentView, found: Diagnosis) -> list[str]:
    """The status for people."""
    phase = paint(seen.phase, STATE_STYLES.get(seen.phase, ""))
    lines = [
        f"{seen.name}  {phase}  {ready_counts(seen)}  {seen.url}",
        f"run: {seen.run_dir}",
    ]
    lines += [f"locked by {seen.locked}"] if seen.locked else []
    lines += [f"changing: {seen.changing}"] if seen.changing else []
    lines += [f"declined: {seen.declined}"] if seen.declined else []
    lines += [f"planner: {seen.planner}"] if seen.planner else []
    if not found.layer:
        return [*lines, "all layers are well: controller, workers, frontends, health"]
    style: Style = "warning" if found.ready else "error"
    lines.append(f"{paint(found.layer, style)}: {found.reason}")
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
