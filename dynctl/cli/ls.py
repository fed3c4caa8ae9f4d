"""`dynctl ls`."""

from __future__ import annotations

import time
from typing import Any

from dynctl.cli import options
from dynctl.cli.direct import ask_from_here
from dynctl.cli.pick import home, state, view
from dynctl.cli.render import age, data, json_data, prose, table
from dynctl.deploy.home import RunDir, made_at
from dynctl.deploy.status import ready_counts
from dynctl.errors import CodecError, UsageError


def ls(as_json: options.Json = False) -> None:
    """All deployments of this user: the latest run of each name."""
    place = home()
    found = [
        line(run, name)
        for name in place.names()
        if (run := place.note_of(name) or place.run_of(name)) is not None
    ]
    if as_json:
        json_data(found)
    elif found:
        shown = [
            [d[key] or "-" for key in ("name", "phase", "ready", "age", "url", "run_dir")] for d in found
        ]
        data(table(("NAME", "PHASE", "READY", "AGE", "URL", "RUN"), shown, state_column=1))
    else:
        prose("no deployments; dynctl up RECIPE starts one")


def line(run: RunDir, name: str) -> dict[str, Any]:
    """What is said of one deployment."""
    if run.remote.exists():
        return elsewhere(run, name)
    try:
        seen, kept = view(run), state(run)
    except (CodecError, UsageError) as error:
        return {
            "name": name,
            "phase": "unreadable",
            "reason": str(error),
            "ready": "",
            "age": "",
            "url": "",
        } | {"run_dir": str(run.path)}
    return {
        "name": name,
        "phase": seen.phase,
        "reason": seen.reason,
        "ready": ready_counts(seen),
        "age": age(time.time() - kept.created_at),
        "url": seen.url,
        "run_dir": seen.run_dir,
    }


def elsewhere(run: RunDir, name: str) -> dict[str, Any]:
    """What is known here of a deployment that its head looks after: what its controller says, where that can
    be asked from here, else that it is "remote".
    """
    from dynctl.deploy.remote_note import read_remote

    remote, seen = read_remote(run), ask_from_here(run)
    left = f", left on {', '.join(remote.left)}" if remote.left else ""
    return {
        "name": name,
        "phase": "stopped" if remote.ended else "remote" if seen is None else seen.phase,
        "reason": "" if seen is None else seen.reason,
        "ready": "" if seen is None else ready_counts(seen),
        "age": age(time.time() - (made_at(remote.run_id) or run.path.stat().st_ctime)),
        "url": "" if seen is None else seen.url,
        "run_dir": f"{remote.head.name}:{remote.head.home}/runs/{remote.run_id}{left}",
    }
