"""audit.jsonl: who changed a deployment, one JSON object a line."""

from __future__ import annotations

import getpass
import logging
import os
import socket
import time
from collections.abc import Sequence

from dynctl.deploy.events import append_event
from dynctl.deploy.home import RunDir
from dynctl.protocol.day2 import Actor

logger = logging.getLogger(__name__)

_HIDDEN = "***"


def actor(verb: str, args: Sequence[str] = (), *, force: bool = False) -> Actor:
    """This user on this machine. Values of what may be a secret are left out."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.geteuid())
    given = [*args, "--force"] if force else args
    return Actor(user=user, host=socket.gethostname(), verb=verb, args=shown(given), force=force)


def shown(args: Sequence[str]) -> list[str]:
    """Arguments without secrets: of settings that may hold one only the name."""
    return [_shown(arg) for arg in args]


def _shown(arg: str) -> str:
    name, equals, _ = arg.partition("=")
    lowered = name.lower()
    secret = any(word in lowered for word in ("api_key", "api-key", "token", "secret", "password", "env."))
    return f"{name}={_HIDDEN}" if equals and secret else arg


def note(run: RunDir, who: Actor, outcome: str) -> None:
    """As `audit`, by a command that has done what it was to do: a full disk is a word in the log."""
    try:
        audit(run, who, outcome)
    except OSError as error:
        logger.warning("audit.unwritable error=%s", error)


def audit(run: RunDir, who: Actor, outcome: str) -> None:
    """Add one line. Raises OSError."""
    append_event(
        run.audit,
        time.time(),
        f"{who.verb}",
        user=who.user,
        host=who.host,
        args=" ".join(who.args),
        outcome=outcome,
    )
