"""Hosts of the cluster: commands in them as the test user or as root, by namespace or by ssh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.commands import GRACE_S, CommandFailed, Process, Spawned, only_child, run

HERE = Path(__file__).resolve().parent
USER = "dyn"
USER_ID = 5177
MACHINE = "machine"
"""Where a process is that is in no host of the cluster."""
UP_S = 150.0
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(eq=False)
class Hosts:
    """What `up.sh` brought up."""

    folder: Path
    python: Path
    """The test user's interpreter, which has dynctl."""
    addresses: Mapping[str, str] = field(init=False)
    """Host to address: head, n1..n4, priv."""
    user_home: Path = field(init=False)
    """$HOME of the test user, shared by all hosts but `private_home`."""
    private_home: frozenset[str] = field(init=False)
    """Hosts whose $HOME is their own; from outside it is `folder`/hosts/HOST/home."""
    faulted: bool = field(init=False, default=False)
    """A fault has acted since the last repair."""

    def __post_init__(self) -> None:
        rows = [line.split() for line in (self.folder / "hosts/etc_hosts").read_text().splitlines()]
        self.addresses = {name: address for address, name in rows if name != "localhost"}
        self.user_home = Path(f"~{USER}").expanduser()
        variables = dict(line.split("=", 1) for line in (self.folder / "vars").read_text().splitlines())
        self.private_home = frozenset(variables["PRIVATE_HOME"].strip('"').split())

    @property
    def names(self) -> list[str]:
        """All hosts."""
        return list(self.addresses)

    @property
    def nodes(self) -> list[str]:
        """The hosts that are Slurm nodes."""
        return [name for name in self.addresses if name not in {"head", "priv"}]

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`; root and the test user can both use it."""
        return self.folder / "ssh/config"

    @property
    def slurm_conf(self) -> Path:
        """For $SLURM_CONF."""
        return self.folder / "slurm/slurm.conf"

    @property
    def user_id(self) -> int:
        """The number of the test user."""
        return USER_ID

    def user_env(self) -> dict[str, str]:
        """The environment of the test user's commands: its `python` and `dynctl` are first on the PATH."""
        return {
            "HOME": str(self.user_home),
            "USER": USER,
            "LOGNAME": USER,
            "SHELL": "/bin/bash",
            "LANG": "C.UTF-8",
            "PATH": f"{self.python.parent}:{_SYSTEM_PATH}",
            "SLURM_CONF": str(self.slurm_conf),
            "DYNCTL_SSH_CONFIG": str(self.ssh_config),
        }

    def run_as_user(
        self,
        argv: Sequence[str | Path],
        *,
        host: str = "head",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        input: str = "",
        timeout: float = 30.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run as the test user inside a host, or on "machine", without sshd; `cwd` is its $HOME if not said.

        Raises CommandFailed when time is up, with the command and its group killed; an exit code of 128 + n
        stands for signal n.
        """
        limit = ["timeout", "--signal=KILL", str(timeout)]
        began = time.monotonic()
        done = run(
            [*self._enter_as_user(host, cwd), *limit, *argv],
            timeout=timeout + GRACE_S,
            check=False,
            env={**self.user_env(), **(env or {})},
            input=input,
        )
        shown = f"{host}: {shlex.join(map(str, argv))}"
        if done.returncode in {137, -9} and time.monotonic() - began >= timeout:
            raise CommandFailed(f"{shown}: no end after {timeout} s\n{done.stdout}{done.stderr}")
        if check and done.returncode:
            raise CommandFailed(f"{shown}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def dynctl(
        self,
        *args: str | Path,
        home: Path,
        host: str = "head",
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """`dynctl ARGS...` as the test user, with its DYNCTL_HOME."""
        argv = [self.python, "-m", "dynctl.cli.main", *args]
        given = {"DYNCTL_HOME": str(home), **(env or {})}
        return self.run_as_user(argv, host=host, env=given, timeout=timeout, check=check)

    @contextmanager
    def spawn_as_user(
        self,
        argv: Sequence[str | Path],
        *,
        host: str = "head",
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> Iterator[Spawned]:
        """Start as the test user inside a host, in a session of its own; its process is killed at the end."""
        given = {**self.user_env(), **(env or {})}
        enter = self._enter_as_user(host, cwd)
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            with out.open("wb") as file:
                process = subprocess.Popen(
                    [*enter, *map(str, argv)],
                    env=given,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            spawned = Spawned(process, out, entered=host != MACHINE)
            try:
                yield spawned
            finally:
                if process.poll() is None:
                    with suppress(OSError, CommandFailed):
                        spawned.signal(signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE_S)
                process.kill()
                process.wait(GRACE_S)

    def exec(
        self, host: str, *argv: str | Path, timeout: float = 20.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run as root inside a host, without sshd."""
        given = {**os.environ, "SLURM_CONF": str(self.slurm_conf)}
        return run([*self._enter(host), *argv], timeout=timeout, check=check, env=given)

    def ssh(
        self,
        host: str,
        command: str | Sequence[str | Path],
        *,
        timeout: float = 30.0,
        check: bool = True,
        options: Sequence[str] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run as the test user by OpenSSH from the machine; a string goes to the shell as it is.

        The remote process lives on when time is up.
        """
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        always = ["-o", "BatchMode=yes", "-o", "LogLevel=ERROR"]
        argv = ["ssh", "-F", str(self.ssh_config), *always, *options, host, line]
        return run(argv, timeout=timeout, check=check)

    def is_up(self, host: str) -> bool:
        """Whether the host is powered on."""
        return self._pid_1(host) is not None

    def reaches(self, source: str, target: str, port: int = 22, *, within: float = 2.0) -> bool:
        """Whether a TCP connect works from one host, or from "machine", to another."""
        probe = f"exec 3<>/dev/tcp/{self.addresses[target]}/{port}"
        argv = [*self._enter(source), "timeout", str(within), "bash", "-c", probe]
        return run(argv, timeout=within + GRACE_S, check=False).returncode == 0

    def processes(self) -> list[Process]:
        """The living processes of the test user, in hosts and on the machine, but for sshd sessions."""
        places = {spaces(pid): name for name in self.names if (pid := self._pid_1(name))}
        places[spaces(os.getpid())] = MACHINE
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                status = dict(
                    line.split(":\t", 1)
                    for line in (entry / "status").read_text().splitlines()
                    if line.startswith(("Uid:", "State:", "Name:"))
                )
                args = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if str(USER_ID) not in status["Uid"].split() or status["State"][0] in "ZX":
                    continue
                pid = int(entry.name)
                host = places.get(spaces(pid))
                if host is None or args.startswith("sshd: "):
                    continue  # Of another cluster, in a network namespace of its own; or a session.
                found.append(Process(pid, host, args or f"({status['Name']})", status["State"][0]))
            except (OSError, KeyError):
                continue  # It has just ended.
        return sorted(found, key=lambda p: (p.host, p.pid))

    def script(self, name: str, *args: str, timeout: float = UP_S) -> subprocess.CompletedProcess[str]:
        """Run up.sh or down.sh on this cluster."""
        given = {**os.environ, "DYNCTL_CLUSTER_DIR": str(self.folder)}
        return run([HERE / name, *args], timeout=timeout, env=given)

    def _enter(self, host: str) -> list[str]:
        if host == MACHINE:
            return []
        return ["nsenter", "-t", str(self._first(host)), "--all", "--"]

    def _enter_as_user(self, host: str, cwd: str | Path | None) -> list[str]:
        become = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--init-groups"]
        return [*self._enter(host), *become, "env", "-C", str(cwd or self.user_home)]

    def _known(self, host: str) -> None:
        if host not in self.addresses:
            raise CommandFailed(f"no host {host!r} (hosts: {' '.join(self.addresses)})")

    def _first(self, host: str) -> int:
        pid = self._pid_1(host)
        if pid is None:
            raise CommandFailed(f"{host} is off")
        return pid

    def _pid_1(self, host: str) -> int | None:
        """The machine's number of a host's first process; None when the host is off."""
        self._known(host)
        try:
            holder = int((self.folder / "hosts" / host / "pid").read_text())
            if f"dynhost-{host}".encode() not in Path(f"/proc/{holder}/cmdline").read_bytes():
                return None
            return only_child(holder)
        except (OSError, ValueError, CommandFailed):
            return None


def spaces(pid: int) -> tuple[str, str]:
    """The network and the processes that a process sees: where it is."""
    return os.readlink(f"/proc/{pid}/ns/net"), os.readlink(f"/proc/{pid}/ns/pid")
