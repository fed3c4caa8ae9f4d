"""The note that is kept here of a deployment which other machines look after."""

from __future__ import annotations

import msgspec

from dynctl.deploy.home import RunDir
from dynctl.errors import CodecError, LaunchError
from dynctl.launchers.files import write_atomic
from dynctl.topology.inventory import Ssh


class RemoteHost(msgspec.Struct, frozen=True, kw_only=True):
    """One host of such a run, as `HostSite` has it."""

    name: str
    python: str
    home: str
    ssh: Ssh


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is that other machines look after. `hosts` in the order of the inventory, the head first.

    `left`: hosts on which processes may be left, since they could not be reached when it was ended.
    `controller`: its endpoint, where SSH has reached the head at that very address; "" = only by SSH.
    """

    name: str
    run_id: str
    hosts: list[RemoteHost]
    recipe: str
    ended: bool = False
    left: list[str] = []
    controller: str = ""
    version: int = 1

    @property
    def head(self) -> RemoteHost:
        """The host that the controller runs on."""
        return self.hosts[0]


def read_remote(run: RunDir) -> Remote:
    """Where the run is. Raises CodecError, LaunchError."""
    try:
        return msgspec.json.decode(run.remote.read_bytes(), type=Remote)
    except OSError as error:
        raise LaunchError(f"it cannot be read: {error.strerror}", where=str(run.remote)) from error
    except msgspec.MsgspecError as error:
        raise CodecError(f"not the record of a remote run: {error}", where=str(run.remote)) from error


def save_remote(run: RunDir, remote: Remote) -> None:
    """Write down where the run is. Raises LaunchError."""
    try:
        write_atomic(run.remote, msgspec.json.encode(remote))
    except OSError as error:
        raise LaunchError(f"it cannot be written: {error.strerror}", where=str(run.remote)) from error


def save_keys(run: RunDir, keys: str) -> None:
    """Keep what the controller is asked with (0600); "" = nothing any more. Raises LaunchError."""
    try:
        if keys:
            write_atomic(run.keys, keys)
        else:
            run.keys.unlink(missing_ok=True)
    except OSError as error:
        raise LaunchError(f"it cannot be written: {error.strerror}", where=str(run.keys)) from error
