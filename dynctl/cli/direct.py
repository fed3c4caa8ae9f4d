"""A deployment on other machines asked from here: one question to its controller, without SSH."""

from __future__ import annotations

from dynctl.deploy.ask import ask_controller, listens
from dynctl.deploy.home import RunDir
from dynctl.deploy.remote_note import read_remote
from dynctl.errors import DynctlError
from dynctl.protocol.deployment import DeploymentView

_REACHED_S = 0.3
_ANSWER_S = 2.0


def ask_from_here(note: RunDir) -> DeploymentView | None:
    """The deployment as its controller sees it; None when it cannot be asked from here: SSH tells why.

    Raises CodecError, LaunchError for a note that cannot be read.
    """
    remote = read_remote(note)
    if remote.ended or not remote.controller or not listens(remote.controller, _REACHED_S):
        return None
    try:
        return ask_controller(
            note, remote.controller, "controller.status", None, DeploymentView, deadline_s=_ANSWER_S
        )
    except DynctlError:
        return None
