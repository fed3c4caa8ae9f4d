"""`dynctl lock` and `dynctl unlock`."""

from __future__ import annotations

from typing import Annotated

import typer

from dynctl.cli import options
from dynctl.cli.changes import ANSWER_S, Force, running
from dynctl.cli.pick import state
from dynctl.cli.render import json_data, prose
from dynctl.deploy.ask import ask_controller
from dynctl.deploy.audit import actor
from dynctl.errors import UsageError
from dynctl.protocol.day2 import Done, LockCall

Message = Annotated[str, typer.Option("--message", "-m", metavar="TEXT", help="Why, for whoever is refused.")]


def lock(
    message: Message, name: options.Name = None, force: Force = False, as_json: options.Json = False
) -> None:
    """Let nobody change a deployment: verbs that would are refused with the message, who and when.

    up, down, restart, scale, drain, rollback and exec then need --force.

    dynctl lock -m "benchmark until 14:00"
    """
    if not message.strip():
        raise UsageError("a lock says why", hint='-m "benchmark until 14:00"')
    _ask("lock", name, message.strip(), force=force, as_json=as_json)


def unlock(name: options.Name = None, as_json: options.Json = False) -> None:
    """Let a deployment be changed again.

    dynctl unlock
    """
    _ask("unlock", name, "", force=False, as_json=as_json)


def _ask(verb: str, name: str | None, message: str, *, force: bool, as_json: bool) -> None:
    run = running(name)
    kept = state(run)
    call = LockCall(actor=actor(verb, [message] if message else [], force=force), message=message)
    ask_controller(run, kept.registry, "controller.lock", call, Done, deadline_s=ANSWER_S)
    if as_json:
        json_data({"name": kept.name, "locked": message})
    else:
        prose(f"{kept.name} is {'locked' if message else 'unlocked'}", style="good")
