"""Verbs about a deployment that other machines look after: they run on its head, joined to this terminal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

import msgspec

from dynctl.cli.exits import EXIT_CODES
from dynctl.cli.pick import ENV_NAME
from dynctl.cli.render import prose
from dynctl.deploy.home import RunDir
from dynctl.deploy.remote_hosts import HostSite, Remote, RemoteHost, sweep
from dynctl.errors import CodecError, DynctlError, LaunchError, SshError, UsageError
from dynctl.launchers.files import write_atomic
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.ssh_terminal import forward
from dynctl.topology.inventory import Host

T = TypeVar("T")

_DRAIN_S = 5.0


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


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end in a loop of its own."""
    return asyncio.run(work)


def run_there(run: RunDir, verb: str, args: Sequence[str]) -> int:
    """Run a verb on the head; its exit code. After `down` every host is looked at. Raises SshError."""
    remote = read_remote(run)

    async def work() -> int:
        async with SshHosts(SshOptions.find(os.environ)) as hosts:
            code = 0
            try:
                head = await hosts.connect(host_of(remote.head))
                code = await forward(head, command_there(remote, verb, args))
            except SshError as error:
                if verb != "down":
                    raise
                prose(str(error), style="warning")
            if verb != "down":
                return code
            try:
                return await _down(run, remote, hosts, code, force="--force" in args)
            except UsageError as locked:
                if not code:
                    raise
                return EXIT_CODES[locked.kind]  # the head has said so

    return run_async(work())


def command_there(remote: Remote, verb: str, args: Sequence[str]) -> list[str]:
    """The verb as a command of the head."""
    head = remote.head
    passed = {name: os.environ[name] for name in ("NO_COLOR", "DYNCTL_DEBUG") if name in os.environ}
    env = {**passed, "DYNCTL_HOME": head.home, ENV_NAME: remote.name}
    words = [f"{name}={value}" for name, value in env.items()]
    return ["env", *words, head.python, "-m", "dynctl.cli.main", verb, *args]


async def _down(run: RunDir, remote: Remote, hosts: SshHosts, code: int, *, force: bool) -> int:
    """End what the head could not: on hosts that its controller did not reach, or all without one."""
    reached = await hosts.connect_all(host_of(host) for host in remote.hosts)
    sites: list[HostSite] = []
    failed: dict[str, DynctlError] = {}
    for host in remote.hosts:
        there = reached[host.name]
        if isinstance(there, SshHost):
            sites.append(HostSite(host.name, there, host.python, host.home))
        else:
            failed[host.name] = there
    if sites:
        failed |= await sweep(sites, remote.run_id, _DRAIN_S, force=force)
    save_remote(run, msgspec.structs.replace(remote, ended=not failed, left=sorted(failed)))
    if failed:
        raise _left_behind(remote, failed)
    if code:
        prose(f"{remote.name} is down: what its head could not end was ended from here", style="good")
    return 0


def _left_behind(remote: Remote, failed: dict[str, DynctlError]) -> LaunchError:
    told = "".join(f"\n  {error}" for error in failed.values())
    return LaunchError(
        f"processes of '{remote.name}' may be left on {', '.join(sorted(failed))}:{told}",
        hint=f"dynctl down {remote.name} again, when they can be reached",
    )


def host_of(one: RemoteHost) -> Host:
    """The host as SSH reaches it."""
    return Host(one.name, one.name, ssh=one.ssh, python=one.python)
