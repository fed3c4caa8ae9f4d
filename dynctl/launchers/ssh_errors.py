"""What went wrong on the way to a host or on it, as one error each: host, layer, first line, remedy."""

from __future__ import annotations

import asyncio
import errno
import os
import shlex
import socket

import asyncssh

from dynctl.errors import (
    HostDiskFull,
    HostKeyChanged,
    HostKeyUnknown,
    HostLost,
    HostPythonMissing,
    HostTimeout,
    HostUnreachable,
    SshAuthRefused,
    SshError,
)
from dynctl.launchers.ssh_config import CONFIG_VARIABLE, Target

ERRORS = (OSError, asyncssh.Error, asyncssh.KeyImportError, ValueError)
"""What dialling may raise, TimeoutError being an OSError."""
_FULL = ("no space left on device", "disk quota exceeded")
_NOT_FOUND = 127
_NOT_RUNNABLE = 126


def first_line(text: bytes) -> str:
    """The first line that says something, as text."""
    lines = (line.strip() for line in text.decode("utf-8", "replace").splitlines())
    return next((line for line in lines if line), "")


def connect_error(error: Exception, target: Target, deadline_s: float, agent: str = "") -> SshError:
    """Why a host could not be dialled. `agent` is what is known of the keys in the agent."""
    if isinstance(error, SshError):
        return error
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return _key_error(error, target)
    if isinstance(error, asyncssh.PermissionDenied):
        return _refused(target, agent)
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return _no_exchange(error, target)
    if isinstance(error, TimeoutError) and getattr(error, "errno", None) is None:
        way = f" by way of {target.jumps}" if target.jumps else ""
        return HostTimeout(
            f"no SSH connection to {target.place}{way} within {deadline_s:g} s",
            where=target.name,
            hint=f"{_by_hand(target)} shows how far it gets",
        )
    return _unreachable(error, target)


def _unreachable(error: Exception, target: Target) -> SshError:
    if isinstance(error, socket.gaierror):
        return HostUnreachable(
            f"the name {target.host} is not known",
            where=target.name,
            hint="`host:` of the inventory or HostName of the SSH configuration says what to connect to",
        )
    if isinstance(error, asyncssh.ChannelOpenError):
        return HostUnreachable(
            f"{target.jumps} cannot reach {target.place}: {error.reason}", where=target.name
        )
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError | BrokenPipeError):
        return HostLost(
            f"{target.place} closed the connection before anybody was logged in",
            where=target.name,
            hint="its sshd's log says why; too many logins at once are refused by its MaxStartups",
        )
    if isinstance(error, asyncssh.Error):
        return SshError(f"SSH to {target.place}: {error.reason}", where=target.name)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ECONNREFUSED or "Connect call failed" in reason:
        reason = "Connection refused" if number == errno.ECONNREFUSED else reason
    hint = "is its sshd running, and on this port?" if number == errno.ECONNREFUSED else ""
    return HostUnreachable(
        f"no connection to {target.place}: {_plain(number, reason)}",
        where=target.name,
        hint=hint or "is it switched on, and is the address right?",
    )


def _plain(number: int | None, reason: str) -> str:
    """The kernel's own words: asyncio puts the address into the text, which is told already."""
    return os.strerror(number) if number is not None and number > 0 else reason


def _by_hand(target: Target) -> str:
    """The command that makes the same connection."""
    config = _config_option(target)
    return shlex.join(["ssh", *config, target.settings.orig_host])


def _config_option(target: Target) -> list[str]:
    named = os.environ.get(CONFIG_VARIABLE)
    return ["-F", named] if named else []


def _key_error(error: asyncssh.HostKeyNotVerifiable, target: Target) -> SshError:
    file = str(target.known_hosts.files[0]) if target.known_hosts.files else "~/.ssh/known_hosts"
    named = target.alias or target.host
    entry = f"[{named}]:{target.port}" if target.port != 22 else named
    shown = f" ({target.seen.get_algorithm()} {target.seen.get_fingerprint()})" if target.seen else ""
    if target.known:
        files = ", ".join(str(f) for f in target.known_hosts.files if f.exists())
        return HostKeyChanged(
            f"the host key of {target.place} is not the known one{shown}: {error.reason}",
            where=target.name,
            hint=f"somebody may be in between; if it has a new key indeed: "
            f"ssh-keygen -R {shlex.quote(entry)} -f {shlex.quote(file)}, then add the new one "
            f"(known hosts: {files})",
        )
    if target.jumps or target.alias:
        way = f"{shlex.join(['ssh', *_config_option(target), '-o', 'StrictHostKeyChecking=ask'])}"
        way = f"{way} {shlex.quote(target.settings.orig_host)}"
    else:
        port = ["-p", str(target.port)] if target.port != 22 else []
        way = f"{shlex.join(['ssh-keyscan', *port, target.host])} >> {shlex.quote(file)}"
    return HostKeyUnknown(
        f"the host key of {target.place} is not known{shown}",
        where=target.name,
        hint=f"add it to {file}: {way}; compare its fingerprint with the host's own",
    )


def _no_exchange(error: asyncssh.KeyExchangeFailed, target: Target) -> SshError:
    if target.known and "host key" in error.reason.lower():
        return HostKeyChanged(
            f"{target.place} has no host key of the kind that is known: {error.reason}",
            where=target.name,
            hint="somebody may be in between; if it has a new key indeed, add that one to known_hosts",
        )
    return SshError(f"SSH to {target.place} found no common ground: {error.reason}", where=target.name)


def _refused(target: Target, agent: str) -> SshError:
    tried = ", ".join(target.identities.told) or "no key file"
    return SshAuthRefused(
        f"{target.user}@{target.host} was not let in; tried: {tried}; {agent or 'no agent'}",
        where=target.name,
        hint=f"{_by_hand(target)} must work without a password: put the public key into its "
        f"~/.ssh/authorized_keys, or name user and key in the inventory",
    )


def lost(host: str, what: str) -> HostLost:
    """The connection broke while something was being done."""
    return HostLost(
        f"the connection was lost during {what}",
        where=host,
        hint="what it began may still be going on there; try again once the host can be reached",
    )


def too_late(host: str, what: str, deadline_s: float) -> HostTimeout:
    """A command took longer than it may."""
    return HostTimeout(
        f"{what} did not end within {deadline_s:g} s",
        where=host,
        hint="the host or its file system may hang; the command may still be running there",
    )


def command_error(host: str, what: str, code: int, stderr: bytes) -> SshError:
    """Why a command on a host failed: `what` is its program or what it was to do."""
    line = first_line(stderr)
    full = next((text for text in stderr.decode("utf-8", "replace").splitlines() if is_full(text)), "")
    if full:
        return HostDiskFull(
            f"its disk is full: {full.strip()}", where=host, hint="free some space there, then try again"
        )
    told = (
        f"{what} failed there with exit code {code}" if code >= 0 else f"{what} was ended by signal {-code}"
    )
    return SshError(f"{told}: {line}" if line else told, where=host)


def python_error(host: str, python: str, code: int, stderr: bytes) -> SshError:
    """Why a host's Python did not do what it was to."""
    if code not in (_NOT_FOUND, _NOT_RUNNABLE):
        return command_error(host, python, code, stderr)
    return HostPythonMissing(
        f"{python} cannot be run there: {first_line(stderr) or f'exit code {code}'}",
        where=host,
        hint="install Python 3.11 or newer, or name one with `python:` in the inventory",
    )


def is_full(line: str) -> bool:
    """Whether a line says that a disk or quota is full."""
    return any(text in line.lower() for text in _FULL)


async def agent_keys(path: str, deadline_s: float = 2.0) -> str:
    """What the agent has, for people."""
    if not path:
        return "no agent (SSH_AUTH_SOCK is not set)"
    try:
        async with asyncio.timeout(deadline_s):
            async with asyncssh.connect_agent(path) as agent:
                keys = await agent.get_keys()
    except (OSError, ValueError, asyncssh.Error):
        return f"agent {path} does not answer"
    names = ", ".join(key.get_comment() or key.get_algorithm() for key in keys)
    return f"agent with {len(keys)} keys ({names})" if keys else "agent without keys"
