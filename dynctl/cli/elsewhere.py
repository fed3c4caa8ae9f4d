"""Verbs about a deployment that other machines look after: they run on its head, joined to this terminal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from dynctl.cli.exits import EXIT_CODES
from dynctl.cli.pick import ENV_NAME, ENV_RUN_ID
from dynctl.cli.render import prose
from dynctl.deploy.home import Home, RunDir
from dynctl.deploy.remote_hosts import HostSite, sweep
from dynctl.deploy.remote_note import Remote, RemoteHost, read_remote, save_keys, save_remote
from dynctl.errors import DynctlError, LaunchError, SshError, UsageError
from dynctl.launchers.ssh import SshHosts
from dynctl.launchers.ssh_config import SshOptions
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.ssh_terminal import forward
from dynctl.topology.inventory import Host

T = TypeVar("T")

_DRAIN_S = 5.0
FORGET, REMOVE = "--forget", "--remove"


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end in a loop of its own."""
    return asyncio.run(work)


def run_there(run: RunDir, verb: str, args: Sequence[str]) -> int:
    """Run a verb on the head; its exit code. After `down` every host is looked at. Raises SshError."""
    remote = read_remote(run)

    async def work() -> int:
        async with SshHosts(SshOptions.find(os.environ)) as hosts:
            if verb != "down":
                head = await hosts.connect(host_of(remote.head))
                return await forward(head, command_there(remote, verb, args))
            others = asyncio.ensure_future(hosts.connect_all(host_of(host) for host in remote.hosts[1:]))
            try:
                return await _down(run, remote, hosts, others, args)
            finally:
                others.cancel()

    return run_async(work())


def command_there(remote: Remote, verb: str, args: Sequence[str]) -> list[str]:
    """The verb as a command of the head."""
    head = remote.head
    passed = {name: os.environ[name] for name in ("NO_COLOR", "DYNCTL_DEBUG") if name in os.environ}
    env = {**passed, "DYNCTL_HOME": head.home, ENV_NAME: remote.name, ENV_RUN_ID: remote.run_id}
    words = [f"{name}={value}" for name, value in env.items()]
    return ["env", *words, head.python, "-m", "dynctl.cli.main", verb, *args]


@dataclass(frozen=True, slots=True)
class How:
    """`force`: also when it is locked; `forget`: the name is to be free whatever cannot be reached; `remove`:
    nothing of it is to be kept; `ended`: the head has ended all that its controller reached.
    """

    force: bool
    forget: bool
    remove: bool
    ended: bool


async def _down(
    run: RunDir,
    remote: Remote,
    hosts: SshHosts,
    others: Awaitable[dict[str, SshHost | SshError]],
    args: Sequence[str],
) -> int:
    """Have the head end it; then what it could not: where its controller did not reach, or all without one.
    `others` are being dialled meanwhile.
    """
    code, head = 0, host_of(remote.head)
    there = [word for word in args if word not in (FORGET, REMOVE)]
    try:
        code = await forward(await hosts.connect(head), command_there(remote, "down", there))
        ended = not code
    except SshError as error:
        prose(str(error), style="warning")
        ended = False
    reached = await hosts.connect_all([head]) | await others
    try:
        return await _sweep(
            run, remote, reached, code, How("--force" in args, FORGET in args, REMOVE in args, ended)
        )
    except UsageError as locked:
        if not code:
            raise
        return EXIT_CODES[locked.kind]  # the head has said so


async def _sweep(
    run: RunDir,
    remote: Remote,
    reached: Mapping[str, SshHost | SshError],
    code: int,
    how: How,
) -> int:
    """End what is left on each host, and write down where it could not be looked."""
    sites: list[HostSite] = []
    failed: dict[str, DynctlError] = {}
    for host in remote.hosts:
        there = reached[host.name]
        if isinstance(there, SshHost):
            sites.append(HostSite(host.name, there, host.python, host.home))
        else:
            failed[host.name] = there
    if sites:
        failed |= await sweep(
            sites,
            remote.run_id,
            _DRAIN_S,
            force=how.force,
            at_once=how.ended,
            forget=remote.name if how.remove else "",
        )
    over = how.forget or not failed
    if over:
        save_keys(run, "")
    save_remote(run, msgspec.structs.replace(remote, ended=over, left=sorted(failed)))
    if failed and how.forget:
        told = "".join(f"\n  {error}" for error in failed.values())
        prose(
            f"{remote.name} is forgotten, its name is free; not ended, should it live still, is what is on"
            f" {', '.join(sorted(failed))}:{told}",
            style="warning",
        )
        return 0
    if failed:
        raise _left_behind(remote, failed)
    if how.remove:
        Home.holding(run.path).forget(remote.name)
    if code:
        prose(f"{remote.name} is down: what its head could not end was ended from here", style="good")
    return 0


def _left_behind(remote: Remote, failed: dict[str, DynctlError]) -> LaunchError:
    told = "".join(f"\n  {error}" for error in failed.values())
    return LaunchError(
        f"processes of '{remote.name}' may be left on {', '.join(sorted(failed))}:{told}",
        hint=f"dynctl down {remote.name} again, when they can be reached; are they gone for good: --forget",
    )


def host_of(one: RemoteHost) -> Host:
    """The host as SSH reaches it."""
    return Host(one.name, one.name, ssh=one.ssh, python=one.python)
