"""Connections to many hosts at once: one each, in parallel, none waiting for another that hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import asyncssh

from dynctl.errors import SshError
from dynctl.launchers.ssh_config import SshOptions, Target, resolve
from dynctl.launchers.ssh_errors import ERRORS, agent_keys, connect_error
from dynctl.launchers.ssh_host import SshHost
from dynctl.topology.inventory import Host, Ssh

_CLOSE_S = 3.0
_Connection = asyncssh.SSHClientConnection


class SshHosts:
    """The connections of one command or controller. Use it as an async context manager: they end with it."""

    def __init__(self, options: SshOptions) -> None:
        self.options = options
        self._turns = asyncio.Semaphore(options.limit)
        self._hosts: dict[str, SshHost] = {}
        self._dialling: dict[str, asyncio.Lock] = {}
        self._jumps: dict[str, _Connection] = {}

    async def __aenter__(self) -> SshHosts:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        waits = []
        for host in self._hosts.values():
            host.close()
            waits.append(host.wait_lost())
        for connection in self._jumps.values():
            connection.close()
            waits.append(connection.wait_closed())
        self._hosts, self._jumps = {}, {}
        if waits:
            tasks = [asyncio.ensure_future(wait) for wait in waits]
            _, late = await asyncio.wait(tasks, timeout=_CLOSE_S)
            for task in late:
                task.cancel()

    async def connect_all(self, hosts: Iterable[Host]) -> dict[str, SshHost | SshError]:
        """A connection or the reason why there is none, by name, in the order given. Raises nothing else."""
        wanted = list(hosts)
        found = await asyncio.gather(*(self._outcome(host) for host in wanted))
        return {host.name: outcome for host, outcome in zip(wanted, found, strict=True)}

    async def _outcome(self, host: Host) -> SshHost | SshError:
        try:
            return await self.connect(host)
        except SshError as error:
            return error

    async def connect(self, host: Host) -> SshHost:
        """The host's connection: the one there is while it lives, else a new one. Raises SshError."""
        async with self._dialling.setdefault(host.name, asyncio.Lock()):
            there = self._hosts.get(host.name)
            if there is not None and there.alive:
                return there
            async with self._turns:
                made = await self._reach(host.name, host.ssh)
            self._hosts[host.name] = made
            return made

    async def _reach(self, name: str, ssh: Ssh) -> SshHost:
        deadline_s = self.options.connect_s
        target: Target | None = None
        try:
            async with asyncio.timeout(deadline_s):
                target = await resolve(name, ssh, self.options)
                connection = await self._dial(target, (ssh.host,))
                return SshHost(name, connection, dialled=_dialled(connection, target))
        except ERRORS as error:
            if target is None:
                raise SshError(
                    f"its SSH configuration was not read within {deadline_s:g} s", where=name
                ) from error
            agent = await agent_keys(target.agent) if isinstance(error, asyncssh.PermissionDenied) else ""
            raise connect_error(error, target, deadline_s, agent) from error

    async def _dial(
        self, target: Target, passed: tuple[str, ...], tunnel: _Connection | None = None
    ) -> _Connection:
        """Connect through `tunnel`, else by way of the hosts it says."""
        if tunnel is None and target.jumps:
            tunnel = await self._way(target, passed)
        identities = target.identities
        options: dict[str, Any] = {
            "config": None,
            "tunnel": tunnel,
            "known_hosts": target.trusted,
            "client_factory": lambda: _Client(target),
            "keepalive_interval": self.options.keepalive_s,
            "keepalive_count_max": self.options.keepalive_count,
            "connect_timeout": None,
            "login_timeout": self.options.connect_s,
            "agent_forwarding": False,
            "x11_forwarding": False,
            "agent_path": target.agent or None,
            "client_keys": identities.private,
            "ignore_encrypted": True,
        }
        if tunnel is not None:
            options["proxy_command"] = None
        if identities.only:
            options["agent_identities"] = identities.public or None
            options["agent_path"] = (target.agent or None) if identities.public else None
        if not identities.private and not options["agent_path"]:
            options["public_key_auth"] = False  # else asyncssh takes the usual files, whatever their mode
        return await asyncssh.connect(
            target.settings.orig_host, target.port, options=target.settings, **options
        )

    async def _way(self, target: Target, passed: tuple[str, ...]) -> _Connection | None:
        """The connection through which a host is dialled; hosts behind the same one share it."""
        connection: _Connection | None = None
        hops = [hop.strip() for hop in target.jumps.split(",")]
        for number, hop in enumerate(hops):
            ssh = hop_of(hop)
            if ssh.host == target.settings.orig_host:
                continue  # As with `Host *` and ProxyJump: the host on the way needs none to itself.
            if ssh.host in passed:
                raise SshError(
                    f"the way there never ends: {' > '.join((*passed, ssh.host))}", where=target.name
                )
            connection = await self._hop(target.name, ssh, tuple(hops[: number + 1]), connection, passed)
        return connection

    async def _hop(
        self,
        name: str,
        ssh: Ssh,
        way: tuple[str, ...],
        behind: _Connection | None,
        passed: tuple[str, ...],
    ) -> _Connection:
        key = ",".join(way)
        async with self._dialling.setdefault(f"jump {key}", asyncio.Lock()):
            there = self._jumps.get(key)
            if there is not None and not there.is_closed():
                return there
            hop = await resolve(name, ssh, self.options)
            try:
                made = await self._dial(hop, (*passed, ssh.host), behind)
            except ERRORS as error:
                agent = await agent_keys(hop.agent) if isinstance(error, asyncssh.PermissionDenied) else ""
                told = connect_error(error, hop, self.options.connect_s, agent)
                message = f"on the way there, {ssh.host}: {told.message}"
                raise type(told)(message, where=name, hint=told.hint) from error
            self._jumps[key] = made
            return made


def _dialled(connection: _Connection, target: Target) -> str:
    """The address that was dialled from here; "" when another host or program is in between."""
    between = target.jumps or target.settings.config.get("ProxyCommand")
    peer: tuple[str, ...] | None = None if between else connection.get_extra_info("peername")
    return str(peer[0]) if peer else ""


class _Client(asyncssh.SSHClient):
    """Keeps the key of a host that is not known, to tell its fingerprint, and refuses it."""

    def __init__(self, target: Target) -> None:
        self._target = target

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Never: only the keys of known_hosts are good."""
        self._target.seen = key
        return False


def hop_of(text: str) -> Ssh:
    """One host of a ProxyJump: [USER@]HOST[:PORT] or ssh://…; an IPv6 address in brackets."""
    user, _, place = text.removeprefix("ssh://").rpartition("@")
    host, colon, port = place.rpartition(":")
    if colon and port.isdigit() and (not host.count(":") or host.endswith("]")):
        return Ssh(host.strip("[]"), user, int(port))
    return Ssh(place.strip("[]"), user)
