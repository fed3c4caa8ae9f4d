"""`dynctl ps`."""

from __future__ import annotations

import time

import msgspec

from dynctl.cli import options
from dynctl.cli.direct import ask_from_here
from dynctl.cli.pick import Elsewhere, ask, pick
from dynctl.cli.render import age, data, json_data, prose, table
from dynctl.deploy.status import ready_counts, unseen_lines
from dynctl.protocol.deployment import DeploymentView

HEADERS = ("ROLE", "INDEX", "INSTANCE", "NODE", "STATE", "READY", "PID", "ENGINE", "RESTARTS", "AGE", "URL")


def ps(name: options.Name = None, as_json: options.Json = False) -> None:
    """Processes of a deployment and their state.

    PID is the sidecar's, ENGINE its engine's. With --json: a list of objects with role, index, instance,
    node, state, ready, pid, engine_pid, restarts, url and more.
    """
    try:
        seen, silent = ask(pick(name, ended=True))
    except Elsewhere as there:
        answer = ask_from_here(there.run)
        if answer is None:
            raise
        seen, silent = answer, ""
    if silent:
        prose(f"the controller does not answer, this is what it wrote last: {silent}", style="warning")
    if as_json:
        json_data([msgspec.to_builtins(row) for row in seen.processes])
        return
    data(table(HEADERS, rows(seen, seen.at or time.time()), state_column=4))
    prose(", ".join(filter(None, (f"{seen.name}: {seen.phase}", f"ready {ready_counts(seen)}", seen.url))))
    unseen = [line for line in unseen_lines(seen) if line.partition(" (")[0] not in seen.reason]
    for told in (seen.reason, *unseen, f"declined: {seen.declined}" if seen.declined else ""):
        if told:
            prose(told, style="warning")


def rows(seen: DeploymentView, now: float) -> list[list[str]]:
    """One row of cells for each process."""
    return [
        [
            row.role,
            str(row.index),
            row.instance,
            row.node,
            row.state,
            "yes" if row.ready else "no",
            str(row.pid or "-"),
            str(row.engine_pid or "-"),
            str(row.restarts),
            age(now - row.started_at) if row.pid else "-",
            row.url or "-",
        ]
        for row in seen.processes
    ]
