"""What is known of a host before SSH dials it: the user's SSH configuration, keys, agent and known hosts.

The files are OpenSSH's, and so is their meaning, but for one thing: a host without a known key is refused
whatever StrictHostKeyChecking says.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh

from dynctl.errors import SshError
from dynctl.topology.inventory import Ssh

CONFIG_VARIABLE = "DYNCTL_SSH_CONFIG"
_DEFAULT_CONFIGS = ("~/.ssh/config", "/etc/ssh/ssh_config")
_USER_KNOWN = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
_GLOBAL_KNOWN = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_DEFAULT_KEYS = ("id_ed25519", "id_ecdsa", "id_rsa", "id_ed25519_sk", "id_ecdsa_sk")
_SSH_PORT = 22


@dataclass(frozen=True, slots=True)
class SshOptions:
    """How hosts are dialled, in seconds.

    `configs` are read in their order, the first that says something wins. `known_hosts` stands instead of the
    files the configuration names. A connection that carries nothing is asked for a sign of life every
    `keepalive_s`, and given up after `keepalive_count` + 1 of them without an answer.
    """

    configs: tuple[Path, ...] = ()
    known_hosts: tuple[Path, ...] = ()
    connect_s: float = 15.0
    limit: int = 32
    keepalive_s: float = 1.0
    keepalive_count: int = 3

    @staticmethod
    def find(environ: Mapping[str, str]) -> SshOptions:
        """With the file that DYNCTL_SSH_CONFIG names, else the user's and the machine's."""
        named = environ.get(CONFIG_VARIABLE)
        paths = [Path(text).expanduser() for text in ((named,) if named else _DEFAULT_CONFIGS)]
        return SshOptions(configs=tuple(p for p in paths if named or os.access(p, os.R_OK)))


class KnownHosts:
    """The keys of known_hosts files. A file that is not there has none; lines not understood are left out."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self._known = asyncssh.SSHKnownHosts()
        for file in files:
            try:
                lines = file.read_text("utf-8", "replace").splitlines()
            except OSError:
                continue
            for line in lines:
                try:
                    self._known.load(line)
                except ValueError:
                    continue

    def match(self, host: str, port: int) -> tuple[Any, Any, Any]:
        """Trusted keys, trusted authorities, revoked keys of a host by its name alone, as OpenSSH does."""
        found = self._known.match(host, "", port if port != _SSH_PORT else None)
        return found[0], found[1], found[2]


@dataclass(slots=True)
class Identities:
    """The keys there are for a host: files to read, files for the agent only, and what to tell of them."""

    private: list[str] = field(default_factory=list)
    public: list[str] = field(default_factory=list)
    only: bool = False
    told: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Target:
    """One host as the configuration has it. `settings` are asyncssh's; `jumps` is "" for no way round.

    `seen` and `known` are filled in while dialling: the key the host showed, and whether it has a known one.
    """

    name: str
    host: str
    port: int
    user: str
    alias: str
    jumps: str
    settings: asyncssh.SSHClientConnectionOptions
    identities: Identities
    known_hosts: KnownHosts
    agent: str
    seen: asyncssh.SSHKey | None = None
    known: bool = False

    @property
    def place(self) -> str:
        """Address and port, for people."""
        return f"{self.host} port {self.port}"

    def trusted(self, host: str, _address: str, port: int | None) -> tuple[Any, Any, Any]:
        """Look the host's keys up, for asyncssh."""
        found = self.known_hosts.match(host, port or _SSH_PORT)
        self.known = any(found)
        return found


async def resolve(name: str, ssh: Ssh, options: SshOptions) -> Target:
    """Read the configuration for a host. Raises SshError for one that cannot be read."""
    try:
        return await asyncio.to_thread(_resolve, name, ssh, options)
    except (OSError, ValueError, asyncssh.Error, asyncssh.KeyImportError) as error:
        raise SshError(
            f"the SSH configuration cannot be used: {error}",
            where=name,
            hint=f"{CONFIG_VARIABLE} can name another file than ~/.ssh/config",
        ) from error


def _resolve(name: str, ssh: Ssh, options: SshOptions) -> Target:
    given: dict[str, Any] = {"host": ssh.host}
    if ssh.user:
        given["username"] = ssh.user
    if ssh.port is not None:
        given["port"] = ssh.port
    settings = asyncssh.SSHClientConnectionOptions(
        config=[str(path) for path in options.configs], client_keys=None, **given
    )
    said = settings.config
    agent = str(said.get("IdentityAgent") or os.environ.get("SSH_AUTH_SOCK") or "")
    known = KnownHosts(options.known_hosts or _known_files(settings))
    proxy = ssh.proxy_jump or str(settings.tunnel or "")
    return Target(
        name=name,
        host=settings.host,
        port=settings.port,
        user=settings.username,
        alias=settings.host_key_alias or "",
        jumps="" if proxy == "none" else proxy,
        settings=settings,
        identities=_identities(ssh, settings),
        known_hosts=known,
        agent="" if agent.lower() == "none" else str(Path(agent).expanduser()) if agent else "",
    )


def _known_files(settings: asyncssh.SSHClientConnectionOptions) -> list[Path]:
    users: Any = settings.config.get("UserKnownHostsFile", _USER_KNOWN)
    machines: Any = settings.config.get("GlobalKnownHostsFile", _GLOBAL_KNOWN)
    home = str(Path.home())
    return [Path(str(f).replace("%d", home)).expanduser() for f in (*users, *machines)]


def _identities(ssh: Ssh, settings: asyncssh.SSHClientConnectionOptions) -> Identities:
    """The key files: that of the inventory alone, else the configuration's, else the usual ones."""
    configured: Any = settings.config.get("IdentityFile")
    found = Identities(only=bool(ssh.key) or bool(settings.config.get("IdentitiesOnly")))
    paths = [ssh.key] if ssh.key else configured
    if paths is None:
        paths = [str(p) for p in (Path.home() / ".ssh" / key for key in _DEFAULT_KEYS) if p.exists()]
    for path in paths:
        _sort_in(found, Path(path).expanduser())
    return found


def _sort_in(found: Identities, path: Path) -> None:
    try:
        private = path.read_bytes().startswith(b"-----BEGIN")
        status = path.stat()
    except OSError as error:
        found.told.append(f"{path} ({(error.strerror or 'cannot be read').lower()})")
        return
    if not private:
        found.public.append(str(path))
        found.told.append(f"{path} (by the agent)")
        return
    public = path.with_name(path.name + ".pub")
    if public.exists():
        found.public.append(str(public))
    if status.st_uid == os.getuid() and status.st_mode & 0o077:
        found.told.append(f"{path} (left out, others may read it: chmod 600 {shlex.quote(str(path))})")
        return
    try:
        asyncssh.read_private_key(path)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError, OSError) as error:
        encrypted = "passphrase" in str(error).lower()
        told = f"encrypted: ssh-add {shlex.quote(str(path))}" if encrypted else str(error)
        found.told.append(f"{path} ({told})")
    else:
        found.private.append(str(path))
        found.told.append(str(path))
