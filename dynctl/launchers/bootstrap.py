"""dynctl's own code on the hosts: found there, or brought there as a wheel into an environment of its own."""

from __future__ import annotations

import asyncio
import json
import posixpath
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import msgspec

from dynctl.errors import (
    HostDiskFull,
    HostDynctlMissing,
    HostPythonMissing,
    LaunchError,
    SshError,
)
from dynctl.launchers import remote_install
from dynctl.launchers.ssh_errors import is_full, python_error
from dynctl.launchers.ssh_host import SshHost
from dynctl.launchers.wheel import Wheel
from dynctl.topology.inventory import Host

OLDEST_PYTHON = (3, 11)
ENVIRONMENTS = ".dynctl/env"
"""Below the home directory of the host's user: one environment for each dynctl."""
_HINT = "--bootstrap installs this one into an environment of its own there"
_LOOK_S = 30.0
_INSTALL_S = 600.0
_EMPTY_BYTES = 10_000_000
"""What an environment takes at least, with nothing but pip in it."""
_SLOWEST = 256 * 1024
"""Bytes a second, for the deadline of an upload."""
_VERSION = "from importlib.metadata import version; print('\\ndynctl ' + version('dynctl'))"
_PYTHON = (
    "import sys, importlib.util as u; "
    "print('\\npython', *sys.version_info[:2], *(m for m in ('venv', 'ensurepip') if u.find_spec(m) is None))"
)
_ON_PATH = (
    'p=$(command -v dynctl || echo "$HOME/.local/bin/dynctl"); [ -f "$p" ] || exit 0; head -c 1024 -- "$p"'
)
_FIRST_LINE = re.compile(rb"#!\s*(\S+)")
_WRAPPED = re.compile(rb"#!/bin/sh\n'''exec' \"?([^\"\n]+?)\"? ")

Progress = Callable[[str, str], None]
"""Called with a host's name and what is being done there."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What is to be brought to hosts. `wheelhouse`: wheels of all it needs, for hosts without an index."""

    wheel: Wheel
    wheelhouse: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Where the files go, below the home: another one for other files."""
        digests = "".join(f"{name} {sha256(content).hexdigest()}\n" for name, content in self._files())
        return f"{ENVIRONMENTS}/.wheels-{sha256(digests.encode()).hexdigest()[:12]}"

    @property
    def manifest(self) -> dict[str, str]:
        """SHA-256 by file name."""
        return {name: sha256(content).hexdigest() for name, content in self._files()}

    @property
    def files(self) -> dict[str, bytes]:
        """All files to send."""
        return dict(self._files())

    def _files(self) -> list[tuple[str, bytes]]:
        return sorted({**self.wheelhouse, self.wheel.filename: self.wheel.content}.items())


def read_wheelhouse(folder: Path, wheel: Wheel) -> dict[str, bytes]:
    """The wheels and source archives of a directory. Raises LaunchError when there are none."""
    try:
        found = {
            p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name.endswith((".whl", ".tar.gz"))
        }
    except OSError as error:
        raise LaunchError(f"the wheelhouse cannot be read: {error.strerror}", where=str(folder)) from error
    if not found:
        raise LaunchError(
            "there are no wheels in it",
            where=str(folder),
            hint=f"{wheelhouse_command(str(folder), wheel)} fills it",
        )
    return found


async def find_dynctl(ssh: SshHost, host: Host, wheel: Wheel) -> str:
    """The interpreter there that has this dynctl: the inventory's, else a bootstrapped one, else PATH's.

    Raises HostDynctlMissing when there is none, or of another version only, with the remedy.
    """
    if host.python:
        return await named_dynctl(ssh, host, wheel.version)
    made = posixpath.join(await ssh.home(), environment_of(wheel), "bin/python")
    if await version_of(ssh, made) == wheel.version:
        return made
    on_path = await _python_on_path(ssh)
    version = await version_of(ssh, on_path) if on_path else ""
    if version == wheel.version:
        return on_path
    told = f"dynctl {version} is there, {wheel.version} is needed" if version else "dynctl is not installed"
    raise HostDynctlMissing(told, where=host.name, hint=f"{_HINT}, or `python:` of the inventory names one")


async def named_dynctl(ssh: SshHost, host: Host, wanted: str) -> str:
    """The interpreter of the inventory, which is to have this version. Raises HostDynctlMissing."""
    version = await version_of(ssh, host.python)
    if version == wanted:
        return host.python
    told = f"has dynctl {version}" if version else "has no dynctl"
    raise HostDynctlMissing(f"{host.python} {told}, {wanted} is needed", where=host.name, hint=_HINT)


def environment_of(wheel: Wheel) -> str:
    """The environment of exactly this dynctl, below the home."""
    return f"{ENVIRONMENTS}/{wheel.key}"


async def version_of(ssh: SshHost, python: str) -> str:
    """Which dynctl an interpreter has; "" when it has none or is not there."""
    done = await ssh.run([python, "-c", _VERSION], timeout_s=_LOOK_S)
    words = done.stdout.split()
    return words[-1].decode("utf-8", "replace") if done.code == 0 and words[-2:-1] == [b"dynctl"] else ""


async def _python_on_path(ssh: SshHost) -> str:
    """The interpreter of the `dynctl` on PATH or in ~/.local/bin; "" when there is none."""
    done = await ssh.run(["sh", "-c", _ON_PATH], timeout_s=_LOOK_S)
    head = done.stdout[max(0, done.stdout.find(b"#!")) :]
    found = _WRAPPED.match(head) or _FIRST_LINE.match(head)
    named = found[1].decode("utf-8", "replace") if found else ""
    return named if "python" in posixpath.basename(named) else ""


async def bootstrap(
    ssh: SshHost, host: Host, what: Bootstrap, progress: Progress = lambda host, step: None
) -> str:
    """The interpreter of the host's environment for this dynctl, made if it is not there. Raises SshError.

    It appears whole or not at all; hosts with one home between them make one.
    """
    home = await ssh.home()
    final = posixpath.join(home, environment_of(what.wheel))
    made = posixpath.join(final, "bin/python")
    progress(host.name, "looking for dynctl")
    if await version_of(ssh, made) == what.wheel.version:
        return made
    base = host.python or "python3"
    await require_python(ssh, base)
    folder = posixpath.join(home, what.folder)
    try:
        await _install(ssh, host, what, folder, progress)
    except HostDiskFull:
        # What was sent would keep the disk full. Whoever shares the home cannot install there now either.
        await ssh.run(["rm", "-rf", "--", folder], timeout_s=_LOOK_S)
        raise
    if await version_of(ssh, made) != what.wheel.version:
        raise HostDynctlMissing(
            f"{made} was installed and has no dynctl {what.wheel.version}", where=host.name
        )
    progress(host.name, "dynctl is there")
    return made


async def _install(ssh: SshHost, host: Host, what: Bootstrap, folder: str, progress: Progress) -> None:
    """Send what is missing of the files into a folder there, and make the environment of them."""
    home, base = await ssh.home(), host.python or "python3"
    final = posixpath.join(home, environment_of(what.wheel))
    asked = {"folder": folder, "files": what.manifest}
    needed = _EMPTY_BYTES + sum(map(len, what.files.values()))
    look = {"do": "missing", "needed_bytes": needed, **asked}
    missing = msgspec.convert(await _remote(ssh, base, look, what.wheel, _LOOK_S), list[str])
    if missing:
        whole = sum(len(what.files[name]) for name in missing) / 1e6
        files = missing[0] if len(missing) == 1 else f"{len(missing)} wheels"
        progress(host.name, f"sending {files} ({whole:.1f} MB)")
    for name in missing:
        content = what.files[name]
        await ssh.put({f"{folder}/{name}": content}, timeout_s=60.0 + len(content) / _SLOWEST)
    progress(host.name, "installing dynctl")
    order = {"do": "install", "final": final, "wheel": what.wheel.filename, "deadline_s": _INSTALL_S, **asked}
    order["offline"] = bool(what.wheelhouse)
    await _remote(ssh, base, order, what.wheel, _INSTALL_S + _LOOK_S)


async def bootstrap_all(
    hosts: Mapping[str, tuple[SshHost, Host]],
    what: Bootstrap,
    progress: Progress = lambda host, step: None,
    *,
    limit: int = 16,
) -> dict[str, str | SshError]:
    """The interpreter of each host or why there is none, by name; hosts do not wait for each other."""
    turns = asyncio.Semaphore(limit)

    async def one(ssh: SshHost, host: Host) -> str | SshError:
        async with turns:
            try:
                return await bootstrap(ssh, host, what, progress)
            except SshError as error:
                return error

    found = await asyncio.gather(*(one(ssh, host) for ssh, host in hosts.values()))
    return dict(zip(hosts, found, strict=True))


async def require_python(ssh: SshHost, python: str) -> None:
    """See that an interpreter can make dynctl's environment. Raises HostPythonMissing with the remedy."""
    done = await ssh.run([python, "-c", _PYTHON], timeout_s=_LOOK_S)
    if done.code != 0:
        raise python_error(ssh.name, python, done.code, done.stderr)
    told = re.findall(r"(?m)^python (\d+) (\d+)(.*)$", done.stdout.decode("utf-8", "replace"))
    if not told:
        raise HostPythonMissing(f"{python} there is no Python", where=ssh.name)
    major, minor, lacks = told[-1]
    version, wanted = (int(major), int(minor)), ".".join(map(str, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        raise HostPythonMissing(
            f"{python} there is Python {major}.{minor}, {wanted} or newer is needed",
            where=ssh.name,
            hint="install a newer one and name it with `python:` in the inventory",
        )
    if lacks.split():
        raise HostPythonMissing(
            f"{python} there makes no environment: it has no module {' and no '.join(lacks.split())}",
            where=ssh.name,
            hint="on Debian and Ubuntu: apt install python3-venv; or name another Python with `python:`",
        )


async def _remote(
    ssh: SshHost, python: str, asked: Mapping[str, object], wheel: Wheel, timeout_s: float
) -> object:
    """Run the installer on the host. Raises SshError for what it tells."""
    source = await asyncio.to_thread(Path(remote_install.__file__).read_bytes)
    done = await ssh.run([python, "-", json.dumps(asked)], stdin=source, timeout_s=timeout_s)
    if done.code != 0:
        raise python_error(ssh.name, python, done.code, done.stderr)
    try:
        answer = msgspec.json.decode(done.stdout.rstrip().rpartition(b"\n")[2], type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise SshError("the installer said nothing that can be understood", where=ssh.name) from error
    if "ok" in answer:
        return answer["ok"]
    step, told = str(answer.get("step")), str(answer.get("error"))
    if is_full(told):
        raise HostDiskFull(f"its disk is full, {step}: {told}", where=ssh.name, hint="free some space there")
    hint = ""
    if "No matching distribution" in told or "Could not find a version" in told:
        hint = "what the wheelhouse lacks" if asked.get("offline") else "the host reaches no package index"
        hint += f": --wheelhouse DIR sends what is needed; it is filled by {wheelhouse_command('DIR', wheel)}"
    raise HostDynctlMissing(f"{step}: {told}", where=ssh.name, hint=hint)


def wheelhouse_command(folder: str, wheel: Wheel) -> str:
    """What fills a wheelhouse, where there is a package index."""
    return shlex.join(["pip", "download", "-d", folder, "--only-binary", ":all:", *wheel.needs])
