"""`dynctl events`."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.pick import pick, view
from dynctl.cli.render import data, paint
from dynctl.deploy.events import Event, read_events
from dynctl.deploy.state import ENDED

_POLL_S = 0.2
_HEAD = ("ts", "event", "id")

Follow = Annotated[bool, typer.Option("--follow", "-f", help="Stay and print new ones; Ctrl-C leaves.")]


Audit = Annotated[bool, typer.Option("--audit", help="Who changed it instead: user, verb, outcome.")]


def events(
    name: options.Name = None, follow: Follow = False, audit: Audit = False, as_json: options.Json = False
) -> None:
    """What happened to a deployment, in order; with --audit who changed it.

    With --json one object a line: ts (Unix time in seconds), event (noun.verb), and what it is about.
    """
    run = pick(name, ended=True)
    offset = 0
    while True:
        over = view(run).phase in ENDED
        found, offset = read_events(run.audit if audit else run.events, offset)
        for event in found:
            data(json.dumps(event) if as_json else line(event))
        if not follow or over:
            return
        time.sleep(_POLL_S)


def line(event: Event) -> str:
    """One event for people."""
    at = float(event.get("ts", 0.0))
    clock = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}.{int(at * 1000) % 1000:03d}"
    rest = "  ".join(f"{k}={v}" for k, v in event.items() if k not in _HEAD and v != "")
    seat = str(event.get("id", ""))
    return f"{paint(clock, 'dim')}  {event['event']:<22}  {seat:<14}  {rest}".rstrip()
