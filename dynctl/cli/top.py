"""`dynctl top`."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Annotated, Any

import msgspec
import typer

from dynctl.cli import options
from dynctl.cli.pick import ask, pick
from dynctl.cli.render import data, json_data
from dynctl.cli.top_view import shown
from dynctl.deploy.figures import Figures, Look, figures
from dynctl.deploy.home import RunDir
from dynctl.deploy.scrape import look as look_at
from dynctl.deploy.state import ENDED
from dynctl.protocol.deployment import DeploymentView

Once = Annotated[bool, typer.Option("--once", help="Measure one interval, print it, leave.")]
Interval = Annotated[
    float,
    typer.Option(
        "--interval", "-n", metavar="TIME", parser=options.duration, help="How often.", show_default="2s"
    ),
]


def top(
    name: options.Name = None, once: Once = False, interval: Interval = 2.0, as_json: options.Json = False
) -> int:
    """Watch a deployment at work: roles, GPUs, running and waiting requests, KV use, hit rate, latencies.

    RUN, WAIT and KV are what the engine says of itself, HIT the part of its prompts' tokens that it had
    cached; rates, TTFT and ITL are those of the last interval, by the frontends' /metrics. Off a terminal one
    block of lines for each interval; with --json one object a line. Ctrl-C leaves.

    dynctl top; dynctl top --once; dynctl top -n 5s --json
    """
    run = pick(name)
    period = max(interval, 0.2)
    if once or as_json or not sys.stdout.isatty():
        return in_lines(run, period, once=once, as_json=as_json)
    return drawn(run, period)


def in_lines(run: RunDir, period: float, *, once: bool, as_json: bool) -> int:
    """Print what happened in each interval, until it has ended."""
    seen = ask(run)[0]
    before = look(seen)
    while True:
        time.sleep(period)
        seen, after = ask(run)[0], look(seen)
        found = figures(before, after)
        if as_json:
            json_data(as_object(seen, found))
        else:
            data("\n".join([*shown(seen, found, columns()), ""]))
        if once or seen.phase in ENDED:
            return 0
        before = after


def drawn(run: RunDir, period: float) -> int:
    """The same in place."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    seen = ask(run)[0]
    before = after = look(seen)
    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        while True:
            lines = shown(seen, figures(before, after), columns())
            live.update(Text.from_ansi("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)
            if seen.phase in ENDED:
                break
            try:
                time.sleep(period)
                before, seen, after = after, ask(run)[0], look(seen)
            except KeyboardInterrupt:
                break
    return 0


def columns() -> int:
    """The width of the terminal."""
    return shutil.get_terminal_size((120, 40)).columns


def look(seen: DeploymentView) -> Look:
    """All frontends that answer, as they are now."""
    doors = [row for row in seen.processes if row.role == "frontend" and row.url and row.pid]
    return look_at({f"{row.id}.{row.incarnation}": row.url for row in doors})


def as_object(seen: DeploymentView, found: Figures) -> dict[str, Any]:
    """The figures for scripts: times in seconds."""
    workers = [
        {"id": row.id, "role": row.role, "node": row.node, "gpus": row.gpus, "state": row.state}
        | (msgspec.to_builtins(found.workers[row.id]) if row.id in found.workers else {})
        for row in seen.processes
        if row.role != "frontend"
    ]
    return {
        "ts": round(time.time(), 3),
        "name": seen.name,
        "phase": seen.phase,
        "changing": seen.changing,
        "requests_per_s": found.requests,
        "errors_per_s": found.errors,
        "tokens_per_s": found.tokens,
        "inflight": found.inflight,
        "queued": found.queued,
        "hit_rate": found.hit_rate,
        "ttft_p50": found.ttft[0],
        "ttft_p95": found.ttft[1],
        "itl_p50": found.itl[0],
        "itl_p95": found.itl[1],
        "workers": workers,
    }
